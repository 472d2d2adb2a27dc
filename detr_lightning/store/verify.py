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
from detr_lightning.format.archive import read_directory
from detr_lightning.format.entries import ImageEntry
from detr_lightning.format.files import checksum_of, is_plain, same_bytes
from detr_lightning.format.keys import DTYPES, EXTRACT_TYPES, KEYS, SPATIAL, ModelShape, dtype_of, shape_of
from detr_lightning.format.metadata import MetadataFile
from detr_lightning.format.names import METADATA, STATE, TEMPORARY, file_name, image_id_of
from detr_lightning.parallel import in_threads
from detr_lightning.store.store import EmbeddingStore

UNIT_RANGE = ("pred_boxes", "cross_attention")
"""Keys whose values are in `[0, 1]`."""


def verify(folder: str | os.PathLike[str], workers: int | None = None, progress: bool | None = None) -> list[str]:
    """Read all that a folder holds and return what is wrong with it.

    For each image this checks the file's size and checksums, its keys and their order, shapes, dtypes, that all values
    are finite and in their range, and that `query_embeddings` are the last layer of `decoder_output`; for the folder,
    that its metadata is complete, unchanged and agrees with itself, and that no file is missing or does not belong.

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
        return [_printable(str(error))]
    metadata = store.metadata_file
    problems = [*_guarded(METADATA, _metadata_problems(metadata)), *_guarded("folder", _folder_problems(store))]
    expected = _Expected.of(metadata)

    def check(image_id: int) -> list[str]:
        return list(_guarded(file_name(image_id), _file_problems(store, expected, image_id)))

    for found in in_threads(check, metadata.image_ids, workers or os.cpu_count() or 1, "Verifying", progress):
        problems.extend(found)
    return list(map(_printable, problems))


def _guarded(name: str, problems: Iterator[str]) -> Iterator[str]:
    """Yield problems; a check that fails is one too, for what is damaged can be anything."""
    try:
        yield from problems
    except Exception as error:
        yield f"{name}: cannot be checked ({type(error).__name__}: {str(error)[:200]})."


def _printable(text: str) -> str:
    """Return text that any console can print: names of files may hold bytes that are no characters."""
    return text.encode("utf-8", "backslashreplace").decode()


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
    if metadata.changed:
        yield f"{METADATA}: was changed after it was written: its checksum does not fit."
    if metadata.num_images != len(ids):
        yield f"{METADATA}: num_images is {metadata.num_images}, image_ids lists {len(ids)}."
    if ids != sorted(set(ids)):
        yield f"{METADATA}: image_ids are not ascending, or one is there twice."
    if metadata.extract_type not in list(EXTRACT_TYPES):
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
        if name.startswith(f"{STATE}.") or name == STATE:
            yield f"{name}: the state of a run that has finished. It can be deleted."
        elif Path(name).match(TEMPORARY):
            yield f"{name}: a temporary file that a killed run left. It can be deleted."
        elif image_id is not None and image_id not in store:
            yield f"{name}: its image is not in {METADATA}."
        elif image_id is None and name != METADATA:
            yield f"{name}: not a file of this extraction."


def _file_problems(store: EmbeddingStore, expected: _Expected, image_id: int) -> Iterator[str]:
    path = store.path(image_id)
    name = path.name
    try:
        entry = store.entry(image_id)
    except InputError as error:
        yield str(error)
        return
    try:
        data = _read(path, entry)
        if entry.bytes != len(data):
            yield f"{name}: has {len(data)} bytes, {METADATA} has {entry.bytes}."
        tensors = _load(data)
    except InputError as error:
        yield f"{name}: {error}."
        return
    if entry.checksum is not None and checksum_of(data) != entry.checksum:
        yield f"{name}: is not the file that was written: its checksum is another than in {METADATA}."
    if tuple(tensors) != store.embedding_keys:
        yield f"{name}: its keys are {', '.join(map(str, tensors))}; expected {', '.join(store.embedding_keys)}."
    for key, tensor in tensors.items():
        for problem in _tensor_problems(expected, entry, key, tensor):
            yield f"{name}: {key} {problem}."
    if all(map(is_plain, tensors.values())):
        for problem in _problems_together(store, image_id, tensors):
            yield f"{name}: {problem}."


def _read(path: Path, entry: ImageEntry) -> bytes:
    """Return a file's bytes, and no more of them than were recorded.

    Raises:
        InputError: It is a link or longer than recorded, or cannot be read; the message is to follow its name.
    """
    if path.is_symlink():
        raise InputError(f"is a link to {os.readlink(path)}, no file of its own")
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if entry.bytes is not None and size > entry.bytes:
                raise InputError(f"has {size} bytes, {METADATA} has {entry.bytes}")
            return file.read()
    except FileNotFoundError:
        raise InputError("missing") from None
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})") from error


def _load(data: bytes) -> dict[str, Tensor]:
    """Return the tensors of a file.

    Raises:
        InputError: It is damaged, or holds something else; the message is to follow its name.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            read_directory(io.BytesIO(data))  # Refuses what would fill the memory.
            damaged = archive.testzip()
        tensors = torch.load(io.BytesIO(data), weights_only=True)
    except Exception as error:  # A damaged file makes zipfile and torch raise nearly anything.
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise InputError(f"damaged, does not load ({reason})") from error
    if damaged is not None:
        raise InputError(f"damaged, the checksum of {damaged} is wrong")
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise InputError("not a dict of tensors")
    return tensors


def _problems_together(store: EmbeddingStore, image_id: int, tensors: dict[str, Tensor]) -> Iterator[str]:
    addresses = [tensor.data_ptr() for tensor in tensors.values() if tensor.numel()]
    if len(set(addresses)) < len(addresses):
        yield "two tensors share one storage"
    for key in store.embedding_keys:
        if key in tensors and not same_bytes(store.load(image_id, key), tensors[key]):
            yield f"{key} is not where the file's own directory has it"
    if "decoder_output" in tensors and "query_embeddings" in tensors:
        decoder, queries = tensors["decoder_output"], tensors["query_embeddings"]
        if not (decoder.ndim and len(decoder) and torch.equal(decoder[-1], queries)):
            yield "query_embeddings are not the last layer of decoder_output"


def _tensor_problems(expected: _Expected, entry: ImageEntry, key: str, tensor: Tensor) -> Iterator[str]:
    if key not in KEYS:
        return
    if entry.features is None:
        yield f"has no feature_size in {METADATA}, so its shape cannot be checked"
    elif expected.shape is not None and tuple(tensor.shape) != (shape := shape_of(key, expected.shape, entry.features)):
        yield f"has the shape {list(tensor.shape)}, expected {list(shape)}"
    if expected.dtype is not None and tensor.dtype != (dtype := dtype_of(key, expected.dtype)):
        yield f"is {tensor.dtype}, expected {dtype}"
    if not is_plain(tensor):
        yield "is not contiguous in a storage of its own"
    elif not torch.isfinite(tensor).all():
        yield "has values that are not finite"
    elif key in UNIT_RANGE and tensor.numel() and not 0 <= tensor.min() <= tensor.max() <= 1:
        yield f"has values from {tensor.min():.4g} to {tensor.max():.4g}, outside of [0, 1]"
