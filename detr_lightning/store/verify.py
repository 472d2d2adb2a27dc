"""Checking a finished extraction: every file is read again, whole, and held against the metadata."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Group
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from detr_lightning.errors import InputError
from detr_lightning.format.entries import ImageEntry
from detr_lightning.format.keys import DTYPES, EXTRACT_TYPES, KEYS, SPATIAL, ModelShape, dtype_of, shape_of
from detr_lightning.format.metadata import MetadataFile
from detr_lightning.format.names import METADATA, TEMPORARY, image_id_of
from detr_lightning.parallel import in_threads
from detr_lightning.store.store import EmbeddingStore


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
    metadata = store.metadata_file
    problems = [*_metadata_problems(metadata), *_folder_problems(store)]
    expected = _Expected.of(metadata)

    def check(image_id: int) -> list[str]:
        return list(_file_problems(store, expected, image_id))

    for found in in_threads(check, metadata.image_ids, workers or os.cpu_count() or 1, "Verifying", progress):
        problems.extend(found)
    return problems


def summary(folder: str | os.PathLike[str]) -> Group:
    """Return what a folder holds, to be printed by rich: its images, its keys with shapes and bytes, how it was made.

    Raises:
        FileNotFoundError: There is no such folder, or its extraction has not finished.
        ValueError: The folder's metadata.json is not one of this program's.
    """
    store = EmbeddingStore(folder)
    metadata = store.metadata_file
    entries = list(map(store.entry, store))
    failed = metadata.failed()
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    try:
        settings = metadata.settings
        model = f"{settings.model.weights}  (sha256 {settings.model.sha256[:8]})"
        stored = f"{settings.dtype}, computed in {settings.precision}"
    except InputError as error:
        model = stored = f"unknown ({error})"
    for name, value in {
        "folder": store.folder,
        "images": len(store),
        "failed": len(failed),
        "extract type": metadata.extract_type,
        "model": model,
        "stored as": stored,
        "on disk": decimal(sum(entry.bytes or 0 for entry in entries)),
        **{f"failed {entry.image_id}": f"{entry.file_name}: {entry.reason}" for entry in failed[:5]},
    }.items():
        facts.add_row(escape(name), escape(str(value)))

    keys = Table("key", "shape", "dtype", "all images")
    keys.columns[3].justify = "right"
    if entries:
        places = [entry.features.places if entry.features else 1 for entry in entries]
        for key, tensor in store[entries[0].image_id].items():
            spatial = key in SPATIAL
            varies = spatial and len({entry.features for entry in entries}) > 1
            share = sum(places) / places[0] if spatial else len(entries)
            shape = f"{list(tensor.shape)}{', varies' if varies else ''}"
            dtype = str(tensor.dtype).removeprefix("torch.")
            keys.add_row(key, escape(shape), dtype, decimal(int(tensor.nbytes * share)))
    return Group(facts, keys)


@dataclass(frozen=True)
class _Expected:
    """The properties of the files that the metadata knows; None where it is incomplete."""

    shape: ModelShape | None = None
    dtype: str | None = None

    @classmethod
    def of(cls, metadata: MetadataFile) -> _Expected:
        try:
            settings = metadata.settings
            return cls(settings.model.shape, settings.dtype if settings.dtype in DTYPES else None)
        except InputError:
            return cls()


def _metadata_problems(metadata: MetadataFile) -> Iterator[str]:
    ids, keys = metadata.image_ids, metadata.embedding_keys
    if metadata.num_images != len(ids):
        yield f"{METADATA}: num_images is {metadata.num_images}, image_ids lists {len(ids)}."
    if ids != sorted(set(ids)):
        yield f"{METADATA}: image_ids are not ascending, or one is there twice."
    if metadata.extract_type not in EXTRACT_TYPES:
        yield f"{METADATA}: extract_type is {metadata.extract_type!r}, none of {', '.join(EXTRACT_TYPES)}."
    if unknown := [key for key in keys if key not in KEYS]:
        yield f"{METADATA}: embedding_keys names {', '.join(unknown)}, which this version does not know."
    try:
        _ = metadata.run.settings.model.shape
    except InputError as error:
        yield f"{METADATA}: {error}, so not all can be checked."
    try:
        failed = {entry.image_id for entry in metadata.failed()}
    except InputError as error:
        yield f"{METADATA}: failed: {error}."
    else:
        if both := [image_id for image_id in ids if image_id in failed]:
            yield f"{METADATA}: image {both[0]} is both extracted and failed ({len(both)} such images)."


def _folder_problems(store: EmbeddingStore) -> Iterator[str]:
    for name in sorted(entry.name for entry in os.scandir(store.folder)):
        image_id = image_id_of(name)
        if Path(name).match(TEMPORARY):
            yield f"{name}: a temporary file that a killed run left. It can be deleted."
        elif image_id is not None and image_id not in store:
            yield f"{name}: its image is not in {METADATA}."
        elif image_id is None and name != METADATA:
            yield f"{name}: not a file of this extraction."


def _file_problems(store: EmbeddingStore, expected: _Expected, image_id: int) -> Iterator[str]:
    path = store.path(image_id)
    name = path.name
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        yield f"{name}: missing."
        return
    except OSError as error:
        yield f"{name}: cannot be read ({error.strerror})."
        return
    try:
        entry = store.entry(image_id)
    except InputError as error:
        yield str(error)
        return
    if entry.bytes != len(data):
        yield f"{name}: has {len(data)} bytes, {METADATA} has {entry.bytes}."
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
    if tuple(tensors) != store.embedding_keys:
        yield f"{name}: its keys are {', '.join(tensors)}; expected {', '.join(store.embedding_keys)}."
    for key, tensor in tensors.items():
        for problem in _tensor_problems(expected, entry, key, tensor):
            yield f"{name}: {key} {problem}."
    if "decoder_output" in tensors and "query_embeddings" in tensors:
        decoder, queries = tensors["decoder_output"], tensors["query_embeddings"]
        if not (decoder.ndim and len(decoder) and torch.equal(decoder[-1], queries)):
            yield f"{name}: query_embeddings are not the last layer of decoder_output."


def _tensor_problems(expected: _Expected, entry: ImageEntry, key: str, tensor: Tensor) -> Iterator[str]:
    if key not in KEYS:
        return
    if entry.features is None:
        yield f"has no feature_size in {METADATA}, so its shape cannot be checked"
    elif expected.shape is not None and tuple(tensor.shape) != (shape := shape_of(key, expected.shape, entry.features)):
        yield f"has the shape {list(tensor.shape)}, expected {list(shape)}"
    if expected.dtype is not None and tensor.dtype != (dtype := dtype_of(key, expected.dtype)):
        yield f"is {tensor.dtype}, expected {dtype}"
    if tensor.untyped_storage().nbytes() != tensor.nbytes or not tensor.is_contiguous():
        yield "is not contiguous in a storage of its own"
    if not torch.isfinite(tensor).all():
        yield "has values that are not finite"
