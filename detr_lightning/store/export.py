"""Embeddings and detections in the formats of other tools: NumPy, Parquet, safetensors, COCO detection results."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from detr_lightning.detections import coco_results
from detr_lightning.errors import MissingPackageError, SettingError, check_choice
from detr_lightning.format.files import replacing
from detr_lightning.parallel import track
from detr_lightning.store.predictions import Predictions
from detr_lightning.store.store import EmbeddingStore

SUFFIXES = {"npy": ".npy", "parquet": ".parquet", "safetensors": ".safetensors", "coco": ".json"}
"""The formats, and the endings of their files' names."""

_BLOCK = 256


def export(
    store: EmbeddingStore,
    output: str | os.PathLike[str],
    format: str = "npy",
    key: str = "query_embeddings",
    *,
    image_ids: Iterable[int] | None = None,
    pool: str | None = None,
    threshold: float = 0.0,
    overwrite: bool = True,
    progress: bool | None = None,
) -> list[Path]:
    """Write one key of a store, or its detections, to a file that appears whole or not at all.

    Args:
        store: The extraction.
        output: The file to write, outside of the store's folder. Missing folders are created.
        format: `npy` writes an array `[N, ...]`, and the image ids beside it in a file that ends in `.ids.npy`.
            `parquet` writes the columns `image_id`, `embedding` (flattened) and `shape` (before flattening).
            `safetensors` writes the tensors `image_ids` and the key; its metadata names the source and the model.
            `coco` writes detections in the format that pycocotools' `loadRes` reads.
        key: Which tensor; not used by `coco`.
        image_ids: Which images, in which order; by default all.
        pool: As for `EmbeddingStore.stack`; not used by `coco`.
        threshold: `coco` leaves out detections that score less; 0 keeps as many as there are queries.
        overwrite: Whether to replace an existing file.
        progress: Show a progress bar; by default for more than 1000 images or after two seconds.

    Returns:
        The files written.

    Raises:
        UnknownImageError: The store has no such image.
        OSError: A file cannot be written.
        MissingPackageError: The format's package is not installed.
        SettingError: As for `EmbeddingStore.stack`; or the format is unknown, the output has another format's ending
            or lies in the store's folder, no detection reaches the threshold, or no image kept a query and the format
            is `parquet`.
    """
    check_choice("format", format, SUFFIXES)
    path = output_path(store, output, SUFFIXES[format], overwrite, ".ids.npy" if format == "npy" else "")
    ids = store.image_ids if image_ids is None else list(image_ids)
    if format == "coco":
        _write_coco(store, path, ids, threshold, progress)
        return [path]
    if format == "safetensors":
        _write_safetensors(store, path, key, pool, *store.stack(key, ids, pool, progress))
        return [path]
    blocks = _blocks(store, key, ids, pool, progress)
    if format == "parquet":
        _write_parquet(path, key, blocks)
        return [path]
    beside = path.with_suffix(".ids.npy")
    with replacing(beside) as ids_file, replacing(path) as file:
        np.save(ids_file, np.asarray(ids, dtype=np.int64))
        _write_npy(file, len(ids), blocks)
    return [path, beside]


def output_path(
    store: EmbeddingStore, output: str | os.PathLike[str], suffix: str, overwrite: bool = True, beside: str = ""
) -> Path:
    """Check and return the path of a file to write from a store, and create missing folders.

    Args:
        store: The store that the data comes from.
        output: The file to write.
        suffix: The required end of its name.
        overwrite: Whether to replace an existing file.
        beside: The ending of a second file to write beside it, if any.

    Raises:
        FileExistsError: It already exists, and `overwrite` is False.
        SettingError: Its name has another ending, it is a folder, or it lies in the store's folder.
    """
    path = Path(output).expanduser()
    if path.is_dir():
        raise SettingError(f"{path} is a folder. Name a file to write.")
    if path.suffix != suffix:
        raise SettingError(f"{path} does not end in {suffix}. Name the file {path.with_suffix(suffix).name}.")
    check_outside(store, path)
    for file in (path, path.with_suffix(beside)) if beside else (path,):
        if not overwrite and file.exists():
            raise FileExistsError(f"{file} already exists. Choose another name, or give --overwrite to replace it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def check_outside(store: EmbeddingStore, path: Path) -> None:
    """Check that a path does not lie in a store's folder.

    Raises:
        SettingError: It does.
    """
    if store.folder is not None and path.resolve().is_relative_to(store.folder.resolve()):
        raise SettingError(
            f"{path} lies in the extraction's own folder, which must contain nothing else. Write elsewhere."
        )


def _blocks(
    store: EmbeddingStore, key: str, ids: list[int], pool: str | None, progress: bool | None
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield ids and tensors of a few hundred images at a time, so that an export needs little memory."""
    starts = range(0, max(len(ids), 1), _BLOCK)
    shape = None
    for start in track(starts, len(starts), f"Exporting {key}", progress):
        chosen, block = store.stack(key, ids[start : start + _BLOCK], pool, progress=False)
        shape = shape or block.shape[1:]
        if block.shape[1:] != shape:
            store.stack(key, [ids[0], chosen[0]], pool)  # Raises: the message names both shapes.
        yield chosen, block


def _write_npy(file: BinaryIO, total: int, blocks: Iterator[tuple[list[int], Tensor]]) -> None:
    for number, (_, block) in enumerate(blocks):
        array = block.numpy()
        if number == 0:
            header = {"descr": array.dtype.str, "fortran_order": False, "shape": (total, *array.shape[1:])}
            np.lib.format.write_array_header_1_0(file, header)
        file.write(array.data)


def _write_parquet(path: Path, key: str, blocks: Iterator[tuple[list[int], Tensor]]) -> None:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise MissingPackageError("Parquet needs pyarrow: pip install 'detr-lightning[analysis]'.") from error

    def table(ids: list[int], block: Tensor) -> Any:
        if not block[0].numel():
            raise SettingError(
                f"Each image's {key} has shape {list(block.shape[1:])}, since no query was kept. Parquet cannot store "
                "vectors of length 0: export to npy or safetensors."
            )
        flat = pa.array(block.float().flatten().numpy())
        columns = {
            "image_id": pa.array(ids, pa.int64()),
            "embedding": pa.FixedSizeListArray.from_arrays(flat, block[0].numel()),
            "shape": pa.array([list(block.shape[1:])] * len(ids), pa.list_(pa.int64(), block.ndim - 1)),
        }
        return pa.table(columns, metadata={"key": key, "shape": json.dumps(list(block.shape[1:]))})

    first = table(*next(blocks))
    with replacing(path) as file, parquet.ParquetWriter(file, first.schema) as writer:
        writer.write_table(first)
        for ids, block in blocks:
            writer.write_table(table(ids, block))


def _write_safetensors(
    store: EmbeddingStore, path: Path, key: str, pool: str | None, ids: list[int], stacked: Tensor
) -> None:
    from safetensors.torch import save

    model = store.metadata_file.model
    metadata = {
        "image_ids": "the image id of each row",
        "key": key,
        "shape": json.dumps(list(stacked.shape[1:])),
        "pool": pool or "none",
        "source": store.location,
        "model": json.dumps({"weights": model and model.weights, "sha256": model and model.sha256}),
    }
    data = save({"image_ids": torch.tensor(ids, dtype=torch.int64), key: stacked}, metadata)
    with replacing(path, len(data)) as file:
        file.write(data)


def _write_coco(store: EmbeddingStore, path: Path, ids: list[int], threshold: float, progress: bool | None) -> None:
    """Write detections image by image, since those of a large dataset do not fit into memory as Python objects.

    Raises:
        SettingError: No detection reaches the threshold; `loadRes` cannot read an empty file.
    """
    predictions = Predictions(store, threshold)
    separator = "[\n"
    best = 0.0
    with replacing(path) as file:
        for image_id in track(ids, len(ids), "Exporting detections", progress):
            detections = predictions.best(image_id)
            best = max([best, *detections.scores.tolist()])
            rows: list[dict[str, Any]] = coco_results(image_id, detections, threshold)
            if rows:
                file.write((separator + ",\n".join(map(json.dumps, rows))).encode())
                separator = ",\n"
        if separator == "[\n":
            raise SettingError(
                f"No query of {len(ids)} images scores {threshold} or more; the best is {best:.3f}. "
                "Lower the threshold."
            )
        file.write(b"\n]\n")
