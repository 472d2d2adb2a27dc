"""Checking a finished extraction: every file is read again and compared with the metadata."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from detr_lightning.errors import InputError
from detr_lightning.format.archive import read_directory
from detr_lightning.format.entries import ImageEntry
from detr_lightning.format.files import checksum_of, is_plain, same_bytes
from detr_lightning.format.keys import AXES, EXTRACT_TYPES
from detr_lightning.format.metadata import MetadataFile
from detr_lightning.format.names import METADATA, STATE, TABLE, TEMPORARY, file_name, image_id_of
from detr_lightning.parallel import in_threads
from detr_lightning.store.store import EmbeddingStore
from detr_lightning.store.tensor_checks import Expected, tensor_problems


def verify(folder: str | os.PathLike[str], workers: int | None = None, progress: bool | None = None) -> list[str]:
    """Read everything in a folder and return its problems.

    For each image this checks the file's size and checksums, its keys and their order, shapes, dtypes, that all values
    are finite and in their range, and that `query_embeddings` are the last layer of `decoder_output`; for the folder,
    that its metadata is complete, unchanged and consistent, and that no file is missing or foreign.

    Args:
        folder: The output folder of an extraction.
        workers: How many files are checked at once; by default one per processor core.
        progress: Show a progress bar; by default for more than 1000 images or after two seconds.

    Returns:
        One line per problem; none if all is well. A folder that cannot be read at all counts as one problem.
    """
    try:
        store = EmbeddingStore(folder)
    except (OSError, ValueError) as error:
        return [_printable(str(error))]
    metadata = store.metadata_file
    problems = [*_guarded(METADATA, _metadata_problems(metadata)), *_guarded("folder", _folder_problems(store))]
    expected = Expected.of(metadata)

    def check(image_id: int) -> list[str]:
        name = f"image {image_id}" if store.is_table else file_name(image_id)
        return list(_guarded(name, (_row_problems if store.is_table else _file_problems)(store, expected, image_id)))

    for found in in_threads(check, metadata.image_ids, workers or os.cpu_count() or 1, "Verifying", progress):
        problems.extend(found)
    return list(map(_printable, problems))


def _guarded(name: str, problems: Iterator[str]) -> Iterator[str]:
    """Yield problems. A check that raises counts as one: damaged data can raise anything."""
    try:
        yield from problems
    except Exception as error:
        yield f"{name}: cannot be checked ({type(error).__name__}: {str(error)[:200]})."


def _printable(text: str) -> str:
    """Return text that any console can print: file names may contain bytes that are not valid characters."""
    return text.encode("utf-8", "backslashreplace").decode()


def _metadata_problems(metadata: MetadataFile) -> Iterator[str]:
    ids, keys = metadata.image_ids, metadata.embedding_keys
    if metadata.changed:
        yield f"{METADATA}: was changed after it was written: its checksum does not match."
    if metadata.num_images != len(ids):
        yield f"{METADATA}: num_images is {metadata.num_images}, but image_ids lists {len(ids)}."
    if ids != sorted(set(ids)):
        yield f"{METADATA}: image_ids are not ascending, or one is repeated."
    if metadata.extract_type not in list(EXTRACT_TYPES):
        yield f"{METADATA}: extract_type is {metadata.extract_type!r}, which is none of {', '.join(EXTRACT_TYPES)}."
    if unknown := [key for key in keys if key not in AXES]:
        yield f"{METADATA}: embedding_keys names {', '.join(unknown)}, which this version does not know."
    try:
        _ = metadata.run.settings.model.shape
    except InputError as error:
        yield f"{METADATA}: {error}, so some checks are skipped."
    try:
        if both := sorted({entry.image_id for entry in metadata.failed()}.intersection(ids)):
            yield f"{METADATA}: image {both[0]} is both extracted and failed ({len(both)} such images)."
    except InputError as error:
        yield f"{METADATA}: failed: {error}."


def _folder_problems(store: EmbeddingStore) -> Iterator[str]:
    if store.folder is None:
        return
    expected = (METADATA, TABLE) if store.is_table else (METADATA,)
    for name in sorted(os.listdir(store.folder)):
        image_id = image_id_of(name)
        if name.startswith(f"{STATE}.") or name == STATE:
            yield f"{name}: the leftover state of a finished run. It can be deleted."
        elif Path(name).match(TEMPORARY):
            yield f"{name}: a temporary file that a killed run left behind. It can be deleted."
        elif image_id is not None and image_id not in store:
            yield f"{name}: its image is not in {METADATA}."
        elif name not in expected and (image_id is None or store.is_table):
            yield f"{name}: not a file of this extraction."


def _file_problems(store: EmbeddingStore, expected: Expected, image_id: int) -> Iterator[str]:
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
            yield f"{name}: has {len(data)} bytes, but {METADATA} records {entry.bytes}."
        tensors = _load(data)
    except InputError as error:
        yield f"{name}: {error}."
        return
    if entry.checksum is not None and checksum_of(data) != entry.checksum:
        yield f"{name}: is not the file that was written: its checksum differs from that in {METADATA}."
    if tuple(tensors) != store.embedding_keys:
        yield f"{name}: its keys are {', '.join(map(str, tensors))}; expected {', '.join(store.embedding_keys)}."
    for problem in (*tensor_problems(expected, entry, tensors), *_storage_problems(store, image_id, tensors)):
        yield f"{name}: {problem}."


def _row_problems(store: EmbeddingStore, expected: Expected, image_id: int) -> Iterator[str]:
    for problem in tensor_problems(expected, store.entry(image_id), store[image_id]):
        yield f"image {image_id}: {problem}."


def _read(path: Path, entry: ImageEntry) -> bytes:
    """Return a file's bytes, without reading more than were recorded.

    Raises:
        InputError: It is a link or longer than recorded, or cannot be read; the message continues the file's name.
    """
    if path.is_symlink():
        raise InputError(f"is a link to {os.readlink(path)}, not a regular file")
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if entry.bytes is not None and size > entry.bytes:
                raise InputError(f"has {size} bytes, but {METADATA} records {entry.bytes}")
            return file.read()
    except FileNotFoundError:
        raise InputError("missing") from None
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})") from error


def _load(data: bytes) -> dict[str, Tensor]:
    """Return the tensors of a file.

    Raises:
        InputError: It is damaged, or contains something else; the message continues the file's name.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            read_directory(io.BytesIO(data))  # Refuses a file that would fill the memory.
            damaged = archive.testzip()
        tensors = torch.load(io.BytesIO(data), weights_only=True)
    except Exception as error:  # A damaged file makes zipfile and torch raise nearly anything.
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise InputError(f"is damaged and does not load ({reason})") from error
    if damaged is not None:
        raise InputError(f"is damaged: the checksum of {damaged} is wrong")
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise InputError("not a dict of tensors")
    return tensors


def _storage_problems(store: EmbeddingStore, image_id: int, tensors: dict[str, Tensor]) -> Iterator[str]:
    if not all(map(is_plain, tensors.values())):
        return
    addresses = [tensor.data_ptr() for tensor in tensors.values() if tensor.numel()]
    if len(set(addresses)) < len(addresses):
        yield "two tensors share one storage"
    for key in store.embedding_keys:
        if key in tensors and not same_bytes(store.load(image_id, key), tensors[key]):
            yield f"{key} is not at the offset that the file's directory gives"
