"""One call from images to embeddings."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from PIL import Image
from torch import Tensor

from detr_lightning.data.batching import Size
from detr_lightning.data.datamodule import COCODataModule
from detr_lightning.data.files import UnreadableImageError, open_image
from detr_lightning.data.images import Failure, ImageRecord
from detr_lightning.data.transforms import read_pixels, to_pixels
from detr_lightning.embeddings import dtype_of, split
from detr_lightning.extractor import DETRExtractor
from detr_lightning.progress import ImageProgress, calm
from detr_lightning.store import EmbeddingStore
from detr_lightning.store.run import IncompleteError
from detr_lightning.writer import EmbeddingWriter

Source = str | os.PathLike[str] | Image.Image


def extract(
    images: Source | Sequence[Source],
    annotation_file: str | os.PathLike[str] | None = None,
    *,
    weights: str = "detr_resnet50",
    extract_type: str = "decoder",
    keys: list[str] | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    dtype: str = "float32",
    if_exists: str = "resume",
    accelerator: str = "auto",
    precision: Any = "32-true",
    progress: bool = True,
    model: dict[str, Any] | None = None,
    **data: Any,
) -> dict[int, dict[str, Tensor]] | EmbeddingStore:
    """Extract embeddings on one device, with the same numbers as the command.

    Args:
        images: A folder, an image file, a PIL image, or a list of files and PIL images. Images of a list are numbered
            from 1 in its order; a folder's ids are those of the command.
        annotation_file: COCO annotations for a folder.
        weights: An official name, a file, a Hugging Face folder or hub id, or `random`.
        extract_type: `all`, `decoder`, `encoder` or `backbone`.
        keys: An explicit list of tensors instead.
        output_dir: Write files there instead of returning tensors.
        dtype: `float32` or `float16`, for embeddings; logits and boxes stay float32.
        if_exists: For `output_dir`: `resume`, `overwrite` or `error`.
        accelerator: Lightning's, such as `cpu` or `gpu`.
        precision: Lightning's, such as `bf16-mixed`.
        progress: Whether to show a progress bar.
        model: Further settings of `DETRExtractor`, such as `nheads`.
        **data: Further settings of `COCODataModule`, such as `limit`, `batch_size` or `on_error`.

    Returns:
        Without `output_dir` the tensors of each image by its id, as in a `.pt` file; else the folder's store.

    Raises:
        ValueError: A setting that is not allowed, or an image that cannot be read.
        FileNotFoundError: An image, the folder, the annotations or the weights are not there.
    """
    if multiprocessing.get_start_method() != "fork":
        data.setdefault("num_workers", 0)  # other workers would run the caller's script again
    if isinstance(images, str | os.PathLike) and not Path(images).is_file():
        datamodule = COCODataModule(
            os.fspath(images), None if annotation_file is None else os.fspath(annotation_file), **data
        )
    elif annotation_file is not None:
        raise ValueError("annotation_file belongs to a folder of images, not to a list of them.")
    else:
        single = isinstance(images, str | os.PathLike | Image.Image)
        datamodule = ImageList([images] if single else list(images), **data)  # type: ignore[list-item, arg-type]
    extractor = DETRExtractor(weights, extract_type, keys, **(model or {}))
    writer = None if output_dir is None else EmbeddingWriter(os.fspath(output_dir), dtype, if_exists)
    with calm():
        trainer = Trainer(
            accelerator=accelerator,
            devices=1,
            precision=precision,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=progress,
            callbacks=[*([ImageProgress()] if progress else []), *([writer] if writer else [])],
        )
        if writer and writer.plan(trainer, extractor, datamodule).complete:
            return EmbeddingStore(writer.output_dir)
        batches = trainer.predict(extractor, datamodule, return_predictions=writer is None)
    if writer:
        if writer.metadata is None:
            raise IncompleteError(f"The run ended before all images were in {writer.output_dir}.")
        return EmbeddingStore(writer.output_dir)
    found = {
        image_id: {key: torch.empty(t.shape, dtype=dtype_of(key, dtype)).copy_(t) for key, t in tensors.items()}
        for batch in batches or ()
        for image_id, tensors in split(batch)  # type: ignore[arg-type]
    }
    return dict(sorted(found.items()))


class ImageList(COCODataModule):
    """Images that lie anywhere, or in memory alone, numbered from 1.

    Args:
        sources: Paths and PIL images.
        **settings: Of `COCODataModule`.

    Raises:
        ValueError: There is none.
    """

    def __init__(self, sources: Sequence[Source], **settings: Any) -> None:
        super().__init__("", **settings)
        if not sources:
            raise ValueError("There is no image in the list.")
        self.sources = [source if isinstance(source, Image.Image) else Path(source) for source in sources]

    def find(self) -> tuple[list[ImageRecord], list[Failure]]:
        """Return all images, and those whose size cannot be read."""
        records: list[ImageRecord] = []
        failures: list[Failure] = []
        for image_id, source in enumerate(self.sources, start=1):
            record = ImageRecord(image_id, str(source) if isinstance(source, Path) else f"image {image_id}", 0, 0)
            try:
                if isinstance(source, Path):
                    if not source.is_file():
                        raise FileNotFoundError(f"There is no image {source}.")
                    with open_image(source, self.hparams["max_image_pixels"]) as image:
                        width, height = image.size
                else:
                    width, height = source.size
                records.append(replace(record, width=width, height=height))
            except UnreadableImageError as error:
                failures.append((record, error.reason))
        return records, failures

    def reader(self) -> Callable[[ImageRecord, Size], Tensor]:
        """Return what reads an image at a size."""
        return partial(_read, self.sources, self.hparams["image_backend"], self.hparams["max_image_pixels"])


def _read(
    sources: Sequence[Path | Image.Image], backend: str, max_pixels: int | None, record: ImageRecord, size: Size
) -> Tensor:
    source = sources[record.image_id - 1]
    if isinstance(source, Path):
        return read_pixels(source, record, size, backend, max_pixels)
    return to_pixels(source, size)
