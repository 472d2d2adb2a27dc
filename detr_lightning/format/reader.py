"""Reads single tensors from `.pt` files: only their own bytes, at a fraction of the cost of `torch.load`.

A `.pt` file is an uncompressed zip archive: a pickle that describes the tensors, then each tensor's bytes. Files with
the same tensors begin with the same bytes, have their tensors at the same offsets, and end with the same directory. So
torch reads only the first file of each such kind, and files that are laid out in any other way.
"""

from __future__ import annotations

import io
import sys
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detr_lightning.errors import InputError
from detr_lightning.format.archive import Directory, read_directory
from detr_lightning.format.files import same_bytes


@dataclass(frozen=True, slots=True)
class _Place:
    """The location of a tensor in files of one kind."""

    header_at: int
    header: bytes
    dtype: torch.dtype
    shape: torch.Size


@dataclass(frozen=True, slots=True)
class _Kind:
    """Files with the same tensors: how they begin and end, and where their tensors are."""

    head: bytes
    directory: Directory
    places: Mapping[str, _Place]

    def read(self, file: io.FileIO, key: str) -> Tensor | None:
        """Read a tensor of a file, or return None if the file is of another kind."""
        place = self.places.get(key)
        if place is None or not self.directory.is_of(file.fileno()):
            return None
        file.seek(0)
        if file.read(len(self.head)) != self.head:
            return None
        file.seek(place.header_at)
        if _without_checksum(file.read(len(place.header))) != place.header:
            return None
        tensor = torch.empty(place.shape, dtype=place.dtype)
        buffer: Any = tensor.reshape(-1).view(torch.uint8).numpy()  # older stubs of numpy do not call it a buffer
        return tensor if file.readinto(buffer) == len(buffer) else None


class TensorReader:
    """Reads tensors from many files, and remembers the kinds of files. Threads may share one reader."""

    def __init__(self) -> None:
        self._kinds: defaultdict[int, list[_Kind]] = defaultdict(list)

    def read(self, path: Path, key: str) -> Tensor:
        """Return one tensor of a file, in its own memory.

        Raises:
            FileNotFoundError: The file no longer exists.
            InputError: The file is damaged, or lacks the key.
        """
        with _explained(path), open(path, "rb", buffering=0) as file:
            kinds = self._kinds[file.seek(0, io.SEEK_END)]
            for kind in kinds:
                tensor = kind.read(file, key)
                if tensor is not None:
                    return tensor
            directory, infos = read_directory(file)
            tensors = _checked(torch.load(path, weights_only=True, mmap=True))
            if key not in tensors:
                raise InputError(f"it has no {key}, only {', '.join(tensors)}")
            if found := _kind(file, directory, infos, tensors):
                kinds.append(found)
            return tensors[key].clone()


def load(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a file.

    Raises:
        FileNotFoundError: The file no longer exists.
        InputError: The file is damaged.
    """
    with _explained(path), open(path, "rb") as file:
        read_directory(file)  # Refuses a file that would fill the memory.
        file.seek(0)
        return _checked(torch.load(file, weights_only=True))


def _checked(content: object) -> dict[str, Tensor]:
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise InputError("it does not contain a dict of tensors")
    return content


def _kind(
    file: io.FileIO, directory: Directory, infos: list[zipfile.ZipInfo], tensors: dict[str, Tensor]
) -> _Kind | None:
    """Locate the tensors that torch read in a file, or return None if one is not a plain copy of the file's bytes.

    Raises:
        InputError: The tensors at these locations are not those that torch read: the file was made to deceive.
    """
    plain = all(
        tensor.layout is torch.strided and not tensor.is_quantized and tensor.is_contiguous() and tensor.numel()
        for tensor in tensors.values()
    )
    order = next((info for info in infos if info.filename.endswith("/byteorder")), None)
    # One record for each tensor, in the order of their addresses in the memory map.
    records = sorted((info for info in infos if "/data/" in info.filename), key=lambda info: info.header_offset)
    if not plain or order is None or len(records) != len(tensors):
        return None
    if _content(file, order).decode() != sys.byteorder:
        return None
    names = sorted(tensors, key=lambda name: tensors[name].data_ptr())
    places = {
        name: _Place(record.header_offset, _header(file, record), tensors[name].dtype, tensors[name].shape)
        for name, record in zip(names, records, strict=True)
        if record.file_size == tensors[name].nbytes
    }
    file.seek(0)
    kind = _Kind(file.read(records[0].header_offset), directory, places)
    for name in places:
        tensor = kind.read(file, name)
        if tensor is None or not same_bytes(tensor, tensors[name]):
            raise InputError(f"{name} is not where the file's directory places it")
    return kind


def _header(file: io.FileIO, record: zipfile.ZipInfo) -> bytes:
    file.seek(record.header_offset)
    header = file.read(30)  # A record's header has a fixed part, which ends with the lengths of its two variable parts.
    header += file.read(int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little"))
    return _without_checksum(header)


def _content(file: io.FileIO, record: zipfile.ZipInfo) -> bytes:
    header = _header(file, record)
    file.seek(record.header_offset + len(header))
    return file.read(record.file_size)


def _without_checksum(header: bytes) -> bytes:
    """Blank the part of a record's header that depends on the tensor's values."""
    return header[:14] + bytes(4) + header[18:]


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn the errors of torch and zipfile into errors that name the file, with advice."""
    advice = f"`detr-lightning verify {path.parent}` lists the problems of the folder."
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} was removed after the extraction. {advice}") from error
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch has no error type of its own for unreadable files.
        reason = str(error) if isinstance(error, InputError) else "it is damaged or incomplete"
        raise InputError(f"{path} cannot be read: {reason}. {advice}") from error
