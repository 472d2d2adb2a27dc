"""One call from images to embeddings."""

from __future__ import annotations

import difflib
import inspect
import multiprocessing
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from PIL import Image
from torch import Tensor

from detr_lightning.batch import split
from detr_lightning.data.datamodule import COCODataModule
from detr_lightning.data.sources import ListedImages
from detr_lightning.errors import SHOWN, SettingError, SettingTypeError, count
from detr_lightning.extraction.writer import EmbeddingWriter
from detr_lightning.extractor import DETRExtractor
from detr_lightning.format.keys import dtype_of
from detr_lightning.job import Job
from detr_lightning.progress import ImageProgress
from detr_lightning.store import EmbeddingStore
from detr_lightning.system import quiet_lightning

Source = str | os.PathLike[str] | Image.Image


def extract(
    images: Source | Sequence[Source],
    annotation_file: str | os.PathLike[str] | None = None,
    *,
    weights: str | os.PathLike[str] = "detr_resnet50",
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
        Without `output_dir` the tensors of each image by its id, as in a `.pt` file; else the folder's store. Images
        that were skipped are left out, and a warning names them.

    Raises:
        ValueError: A setting that is not allowed, or an image that cannot be read.
        FileNotFoundError: An image, the folder, the annotations or the weights are not there.
        TypeError: An image is neither a path nor a PIL image, or there is no such setting.
    """
    allowed = [*inspect.signature(COCODataModule).parameters, *inspect.signature(extract).parameters]
    for name in data:
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"It has {', '.join(dict.fromkeys(allowed))}."
            raise SettingTypeError(f"extract has no setting {name!r}. {hint}")
    if (multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]) != "fork":
        data.setdefault("num_workers", 0)  # other workers would run the caller's script again
    folder = Path(images).expanduser() if isinstance(images, str | os.PathLike) else None
    if folder is not None and not folder.exists() and not data.get("download"):
        raise FileNotFoundError(f"images: there is no file and no folder {folder}.")
    if folder is not None and not folder.is_file():
        annotations = None if annotation_file is None else os.fspath(annotation_file)
        datamodule = COCODataModule(str(folder), annotations, **data)
    elif annotation_file is not None:
        raise SettingError("annotation_file belongs to a folder of images, not to single ones.")
    else:
        single = isinstance(images, str | os.PathLike | Image.Image)
        datamodule = COCODataModule.of(ListedImages([images] if single else list(images)), **data)  # type: ignore[list-item, arg-type]
    extractor = DETRExtractor(os.fspath(weights), extract_type, keys, **(model or {}))
    writer = None if output_dir is None else EmbeddingWriter(os.fspath(output_dir), dtype, if_exists)
    with quiet_lightning():
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
        job = Job(trainer, extractor, datamodule, writer)
        try:
            job.prepare(precision)
            job.plan()
            batches = job.predict()
        except SystemExit as stopped:  # Lightning's answer to Ctrl-C would end the caller's program.
            raise KeyboardInterrupt from stopped
    metadata = job.finish()
    if writer:
        _warn_of([entry.file_name for entry in metadata.failed] if metadata else [])
        return EmbeddingStore(writer.output_dir)
    found = {
        image_id: {key: torch.empty(t.shape, dtype=dtype_of(key, dtype)).copy_(t) for key, t in tensors.items()}
        for batch in batches
        for image_id, tensors in split(batch)
    }
    records = [*datamodule.records, *(record for record, _reason in datamodule.failures)]
    records.sort(key=lambda record: record.image_id)
    _warn_of([record.file_name for record in records if record.image_id not in found])
    return dict(sorted(found.items()))


def _warn_of(skipped: Sequence[str]) -> None:
    if skipped:
        names = ", ".join(map(repr, skipped[:SHOWN])) + (", ..." if len(skipped) > SHOWN else "")
        warnings.warn(f"{count(len(skipped), 'image')} could not be read: {names}.", stacklevel=3)
