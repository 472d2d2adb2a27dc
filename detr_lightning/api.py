"""`extract`: from images to embeddings in one call."""

from __future__ import annotations

import contextlib
import inspect
import json
import multiprocessing
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Trainer
from PIL import Image

from detr_lightning.data.datamodule import COCODataModule
from detr_lightning.data.sources import ListedImages
from detr_lightning.errors import SHOWN, DETRLightningError, SettingError, SettingTypeError, count, did_you_mean
from detr_lightning.extraction.memory import EmbeddingCollector
from detr_lightning.extraction.writer import EmbeddingWriter
from detr_lightning.extractor import DETRExtractor
from detr_lightning.format.metadata import MetadataFile
from detr_lightning.format.schema import LANCE
from detr_lightning.job import Job
from detr_lightning.progress import ImageProgress
from detr_lightning.store import EmbeddingStore
from detr_lightning.store.tensors import MemoryTensors
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
    allow_slow_precision: bool = False,
    progress: bool = True,
    model: dict[str, Any] | DETRExtractor | None = None,
    writer: dict[str, Any] | None = None,
    **data: Any,
) -> EmbeddingStore:
    """Extract embeddings on one device, with the same results as the command line.

    Args:
        images: A folder, an image file, a PIL image, or a list of files and PIL images. Images in a list are numbered
            from 1, in order; images in a folder have the same ids as on the command line.
        annotation_file: COCO annotations for a folder.
        weights: An official name, a file, a Hugging Face folder or hub id, or `random`.
        extract_type: `all`, `decoder`, `encoder` or `backbone`.
        keys: An explicit list of tensors, instead of `extract_type`.
        output_dir: The folder to write files to; by default, the tensors stay in memory.
        dtype: `float32` or `float16`, for embeddings; logits and boxes stay float32.
        if_exists: For `output_dir`: `resume`, `overwrite` or `error`.
        accelerator: Lightning's accelerator, such as `cpu` or `gpu`.
        precision: Lightning's precision, such as `bf16-mixed`.
        allow_slow_precision: Whether bfloat16 is allowed on a processor without instructions for it.
        progress: Whether to show a progress bar.
        model: Further settings of `DETRExtractor`, such as `{"nheads": 8}`; or a `DETRExtractor`, whose weights, keys
            and settings are then used.
        writer: Further settings of `EmbeddingWriter`, for `output_dir`: `{"min_score": 0.5}` keeps only the queries
            that score 0.5 or more, `{"layout": "lance"}` writes one table.
        **data: Further settings of `COCODataModule`, such as `limit`, `batch_size` or `on_error`.

    Returns:
        A mapping from image ids to the tensors of each image by key, on disk or in memory. Skipped images are left out,
        and a warning names them.

    Raises:
        SettingError: A setting is not allowed.
        SettingTypeError: An image is neither a path nor a PIL image, or a setting does not exist or has another type.
        InputError: An image, the annotations or the weights cannot be used.
        FileNotFoundError: An image, the folder, the annotations or the weights do not exist.
        OSError: `output_dir` cannot be used or written.
        BusyError: Another run is using `output_dir`.
    """
    with _messages_for_python():
        _check_names(data, writer, model)
        if writer and output_dir is None:
            raise SettingError(f"writer={writer} applies only to files on disk. Set output_dir, or leave out writer.")
        method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
        lance = "lance" in sys.modules or (writer or {}).get("layout") == LANCE  # Lance does not survive a fork.
        if method != "fork" or lance:
            data.setdefault("num_workers", 0)  # Workers that are not forked would run the caller's script again.
        datamodule = _images(images, annotation_file, data)
        if isinstance(model, DETRExtractor):
            extractor = model
        else:
            extractor = DETRExtractor(os.fspath(weights), extract_type, keys, **(model or {}))
        to_disk = None
        if output_dir is not None:
            to_disk = EmbeddingWriter(os.fspath(output_dir), dtype, if_exists, **(writer or {}))
        collector = EmbeddingCollector(dtype)
        with quiet_lightning():
            trainer = Trainer(
                accelerator=accelerator,
                devices=1,
                precision=precision,
                logger=False,
                enable_checkpointing=False,
                enable_model_summary=False,
                enable_progress_bar=progress,
                callbacks=[*([ImageProgress()] if progress else []), to_disk or collector],
                plugins=[LightningEnvironment()],  # One process, even in a cluster allocation.
            )
            job = Job(trainer, extractor, datamodule, to_disk)
            try:
                job.prepare(precision, allow_slow_precision)
                job.plan()
                job.predict()
            except SystemExit as stopped:  # Lightning turns Ctrl-C into an exit of the caller's program.
                raise KeyboardInterrupt from stopped
        if to_disk:
            job.finish()
            store = EmbeddingStore(to_disk.output_dir)
        else:
            content = json.dumps(collector.metadata(trainer, extractor, datamodule).to_json()).encode()
            store = EmbeddingStore.of("memory", MetadataFile(Path("memory"), content), MemoryTensors(collector.tensors))
        _warn_about([entry.file_name for entry in store.metadata_file.failed()])
        return store


def _check_names(data: Mapping[str, Any], writer: Any, model: Any) -> None:
    own = [name for name in inspect.signature(extract).parameters if name != "data"]
    of_data = [name for name in inspect.signature(COCODataModule).parameters if name != "image_dir"]
    of_writer, of_model = (
        [name for name in inspect.signature(kind).parameters if name not in (*own, "plan_only")]
        for kind in (EmbeddingWriter, DETRExtractor)
    )
    for given, place, allowed in (
        (data, "extract", [*of_data, *own]),
        (writer or {}, "writer", of_writer),
        ({} if isinstance(model, DETRExtractor) else model or {}, "model", of_model),
    ):
        if not isinstance(given, Mapping):
            raise SettingTypeError(f"{place} is {given!r}, but must be a dict of settings: {', '.join(allowed)}.")
        for name in given:
            if name not in allowed:
                hint = did_you_mean(name, allowed) or f" It has {', '.join(dict.fromkeys(allowed))}."
                if name in own:
                    hint = " Give it to extract itself."
                for group, names in (("writer", of_writer), ("model", of_model)):
                    if name in names:
                        hint = f' Give it as {group}={{"{name}": ...}}.'
                raise SettingTypeError(f"{place} has no setting {name!r}.{hint}")


def _images(
    images: Source | Sequence[Source], annotation_file: str | os.PathLike[str] | None, data: dict[str, Any]
) -> COCODataModule:
    folder = Path(images).expanduser() if isinstance(images, str | os.PathLike) else None
    if folder is not None and not folder.exists() and not data.get("download"):
        raise FileNotFoundError(f"images: {folder} does not exist.")
    if folder is not None and not folder.is_file():
        return COCODataModule(str(folder), None if annotation_file is None else os.fspath(annotation_file), **data)
    if annotation_file is not None:
        raise SettingError("annotation_file needs a folder of images, not single images.")
    single = isinstance(images, str | os.PathLike | Image.Image)
    return COCODataModule.of(ListedImages([images] if single else list(images)), **data)  # type: ignore[list-item, arg-type]


@contextlib.contextmanager
def _messages_for_python() -> Iterator[None]:
    """Rewrite error messages to name settings as arguments of `extract`, not as those of the command line."""
    try:
        yield
    except (DETRLightningError, OSError) as error:
        if len(error.args) == 1 and isinstance(error.args[0], str):
            error.args = (in_python(error.args[0]),)
        raise


def in_python(text: str) -> str:
    """Return a message with the settings named as in `extract`: `dtype='float32'` for `writer.dtype=float32`."""
    classes = {"data": COCODataModule, "writer": EmbeddingWriter, "trainer": Trainer, "model": DETRExtractor}
    for group, configured in classes.items():
        for name in inspect.signature(configured).parameters:
            # Most settings of `model` and `writer` are given in a dict.
            inside = group in ("model", "writer") and name not in inspect.signature(extract).parameters
            ours = f'{group}={{"{name}": ...}}' if inside else name
            value = rf'{group}={{"{name}": "\1"}}' if inside else rf"{name}='\1'"
            text = re.sub(rf"(?<![\w/.]){group}\.{name}=(\w+)", value, text)
            text = re.sub(rf"(?<![\w/.]){group}\.{name}\b", ours, text)
    return text.replace("--allow_slow_precision", "allow_slow_precision=True")


def _warn_about(skipped: Sequence[str]) -> None:
    if skipped:
        names = ", ".join(map(repr, skipped[:SHOWN])) + (", ..." if len(skipped) > SHOWN else "")
        warnings.warn(f"{count(len(skipped), 'image')} could not be read: {names}.", stacklevel=3)
