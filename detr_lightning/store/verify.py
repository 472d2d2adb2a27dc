"""Checking a finished extraction: every file is read again, whole, and held against the metadata."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from rich.console import Group
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from detr_lightning.format import schema
from detr_lightning.format.schema import EXTRACT_TYPES, KEYS, dtype_of, shape_of
from detr_lightning.parallel import in_threads
from detr_lightning.store.store import EmbeddingStore

FURTHER = ("categories", "model", "preprocessing", "batching", "dtype", "precision", "failed", "versions", "config")
"""What metadata.json holds after the keys that reading needs."""

_SPATIAL = ("backbone_features", "encoder_output", "encoder_layers", "cross_attention")


def verify(folder: str | os.PathLike[str], workers: int | None = None, progress: bool | None = None) -> list[str]:
    """Read all that a folder holds and return what is wrong with it.

    Checked are, for each image, the file's size and checksums, its keys and their order, shapes, dtypes, that all
    values are finite, and that `query_embeddings` are the last layer of `decoder_output`; for the folder, that its
    metadata is complete and agrees with itself, and that no file is missing or does not belong there.

    Args:
        folder: The output folder of an extraction.
        workers: How many files are checked at once; by default one for each processor.
        progress: Show a progress bar; by default for more than 1000 images or after two seconds.

    Returns:
        One line for each problem, none where all is well. A folder that cannot be read at all is a problem too.
    """
    try:
        store = EmbeddingStore(folder)
    except (OSError, ValueError) as error:
        return [str(error)]
    problems = [*_metadata_problems(store.metadata), *_folder_problems(store)]

    def check(image: dict[str, Any]) -> list[str]:
        return list(_file_problems(store, image))

    for found in in_threads(check, store.metadata["images"], workers or os.cpu_count() or 1, "Verifying", progress):
        problems.extend(found)
    return problems


def summary(folder: str | os.PathLike[str]) -> Group:
    """Return what a folder holds, to be printed by rich: its images, its keys with shapes and bytes, how it was made.

    Raises:
        FileNotFoundError: There is no such folder, or its extraction has not finished.
        ValueError: The folder's metadata.json is not one of this program's.
    """
    store = EmbeddingStore(folder)
    metadata = store.metadata
    model, images = metadata.get("model", {}), metadata["images"]
    failed = metadata.get("failed", [])
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    for name, value in {
        "folder": store.folder,
        "images": len(store),
        "failed": len(failed),
        "extract type": metadata["extract_type"],
        "model": f"{model.get('weights', 'unknown')}  (sha256 {str(model.get('sha256'))[:8]})",
        "stored as": f"{metadata.get('dtype', 'unknown')}, computed in {metadata.get('precision', 'unknown')}",
        "on disk": decimal(sum(image.get("bytes", 0) for image in images)),
        **{f"failed {entry.get('id')}": f"{entry.get('file_name')}: {entry.get('reason')}" for entry in failed[:5]},
    }.items():
        facts.add_row(escape(name), escape(str(value)))

    keys = Table("key", "shape", "dtype", "all images")
    keys.columns[3].justify = "right"
    if images:
        first = store[images[0]["id"]]
        areas = [_area(image) for image in images]
        for key, tensor in first.items():
            varies = key in _SPATIAL and len({str(image.get("feature_size")) for image in images}) > 1
            share = sum(areas) / areas[0] if key in _SPATIAL else len(images)
            shape = f"{list(tensor.shape)}{', varies' if varies else ''}"
            dtype = str(tensor.dtype).removeprefix("torch.")
            keys.add_row(key, escape(shape), dtype, decimal(int(tensor.nbytes * share)))
    return Group(facts, keys)


def _area(image: dict[str, Any]) -> int:
    height, width = image.get("feature_size") or (1, 1)
    return int(height * width) or 1


def _metadata_problems(metadata: dict[str, Any]) -> Iterator[str]:
    ids, keys = metadata["image_ids"], metadata["embedding_keys"]
    if metadata["num_images"] != len(ids):
        yield f"{schema.METADATA}: num_images is {metadata['num_images']}, image_ids lists {len(ids)}."
    if ids != sorted(set(ids)):
        yield f"{schema.METADATA}: image_ids are not ascending, or one is there twice."
    if metadata["extract_type"] not in EXTRACT_TYPES:
        yield f"{schema.METADATA}: extract_type is {metadata['extract_type']!r}, none of {', '.join(EXTRACT_TYPES)}."
    if unknown := [key for key in keys if key not in KEYS]:
        yield f"{schema.METADATA}: embedding_keys names {', '.join(unknown)}, which this version does not know."
    if lacking := [key for key in FURTHER if key not in metadata]:
        yield f"{schema.METADATA}: {', '.join(lacking)} is missing."
    if "model" in metadata and _architecture(metadata) is None:
        yield f"{schema.METADATA}: model.architecture is incomplete, so shapes cannot be checked."
    failed = {entry.get("id") for entry in metadata.get("failed", []) if isinstance(entry, dict)}
    if both := [image_id for image_id in ids if image_id in failed]:
        yield f"{schema.METADATA}: image {both[0]} is both extracted and failed ({len(both)} such images)."


def _folder_problems(store: EmbeddingStore) -> Iterator[str]:
    for name in sorted(entry.name for entry in os.scandir(store.folder)):
        image_id = schema.image_id_of(name)
        if Path(name).match(schema.TEMPORARY):
            yield f"{name}: a temporary file that a killed run left. It can be deleted."
        elif image_id is not None and image_id not in store:
            yield f"{name}: its image is not in {schema.METADATA}."
        elif image_id is None and name != schema.METADATA:
            yield f"{name}: not a file of this extraction."


def _file_problems(store: EmbeddingStore, image: dict[str, Any]) -> Iterator[str]:
    path = store.path(image["id"])
    name = path.name
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        yield f"{name}: missing."
        return
    except OSError as error:
        yield f"{name}: cannot be read ({error.strerror})."
        return
    if image.get("bytes") != len(data):
        yield f"{name}: has {len(data)} bytes, {schema.METADATA} says {image.get('bytes')}."
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            damaged = archive.testzip()
        tensors = torch.load(io.BytesIO(data), weights_only=True)
    except Exception as error:  # A damaged file makes zipfile and torch raise nearly anything.
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        yield f"{name}: damaged, does not load ({reason})."
        return
    if damaged is not None:
        yield f"{name}: damaged, the checksum of {damaged} is wrong."
        return
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        yield f"{name}: not a dict of tensors."
        return
    if list(tensors) != store.metadata["embedding_keys"]:
        yield f"{name}: its keys are {', '.join(tensors)}; expected {', '.join(store.embedding_keys)}."
    for key, tensor in tensors.items():
        for problem in _tensor_problems(store.metadata, image, key, tensor):
            yield f"{name}: {key} {problem}."
    if "decoder_output" in tensors and "query_embeddings" in tensors:
        decoder, queries = tensors["decoder_output"], tensors["query_embeddings"]
        if not (decoder.ndim and len(decoder) and torch.equal(decoder[-1], queries)):
            yield f"{name}: query_embeddings are not the last layer of decoder_output."


def _tensor_problems(metadata: dict[str, Any], image: dict[str, Any], key: str, tensor: Tensor) -> Iterator[str]:
    architecture = _architecture(metadata)
    if key not in KEYS:
        return
    if architecture is not None:
        try:
            height, width = image["feature_size"]
            # Only the sizes are looked at, so that reading a folder does not import the model.
            expected = shape_of(key, cast(Any, architecture), (height, width))
        except (KeyError, TypeError, ValueError):
            yield f"has no feature_size in {schema.METADATA}, so its shape cannot be checked"
        else:
            if tuple(tensor.shape) != expected:
                yield f"has the shape {list(tensor.shape)}, expected {list(expected)}"
    dtype = metadata.get("dtype")
    if dtype in ("float32", "float16") and tensor.dtype != dtype_of(key, dtype):
        yield f"is {tensor.dtype}, expected {dtype_of(key, dtype)}"
    if tensor.untyped_storage().nbytes() != tensor.nbytes or not tensor.is_contiguous():
        yield "is not contiguous in a storage of its own"
    if not torch.isfinite(tensor).all():
        yield "has values that are not finite"


def _architecture(metadata: dict[str, Any]) -> SimpleNamespace | None:
    """Return the model's sizes as `shape_of` wants them, or None where the metadata lacks one."""
    try:
        sizes = SimpleNamespace(**metadata["model"]["architecture"])
        sizes.feature_channels = 512 if sizes.block == "basic" else 2048
        for key in KEYS:
            torch.Size(shape_of(key, cast(Any, sizes), (1, 1)))
    except (KeyError, TypeError, AttributeError):
        return None
    return sizes
