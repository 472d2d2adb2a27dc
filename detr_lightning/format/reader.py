"""Reading one tensor out of a `.pt` file: only its own bytes, at a fraction of what `torch.load` costs.

A `.pt` file is a zip archive, uncompressed: a pickle that says which tensors there are, then each tensor's bytes. Files
with the same tensors begin with the same bytes and have their tensors at the same places, so it is enough to ask torch
once for each such beginning. A file whose beginning is new, or that is laid out in any other way, goes through torch.
"""

from __future__ import annotations

import io
import sys
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from detr_lightning.errors import InputError


class _Place(NamedTuple):
    """Where files that begin with `head` hold a tensor."""

    head: bytes
    header_at: int
    header: bytes
    dtype: torch.dtype
    shape: torch.Size


class TensorReader:
    """Reads single tensors of many files, and remembers how the files are laid out. Threads may share one."""

    def __init__(self) -> None:
        self._places: defaultdict[tuple[str, int], list[_Place]] = defaultdict(list)

    def read(self, path: Path, key: str) -> Tensor:
        """Return one tensor of a file, with memory of its own.

        Raises:
            FileNotFoundError: The file is gone.
            ValueError: The file is damaged, or lacks the key.
        """
        with _explained(path), open(path, "rb", buffering=0) as file:
            places = self._places[key, file.seek(0, io.SEEK_END)]
            for place in places:
                tensor = _read(file, place)
                if tensor is not None:
                    return tensor
            tensors: dict[str, Tensor] = torch.load(path, weights_only=True, mmap=True)
            if key not in tensors:
                raise InputError(f"it holds no {key}, only {', '.join(tensors)}")
            if found := _find(path, tensors, key):
                places.append(found)
            return tensors[key].clone()


def load(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a file.

    Raises:
        FileNotFoundError: The file is gone.
        ValueError: The file is damaged.
    """
    with _explained(path):
        tensors: dict[str, Tensor] = torch.load(path, weights_only=True)
        return tensors


def _read(file: io.FileIO, place: _Place) -> Tensor | None:
    """Read the tensor at a place, or return None where the file is laid out differently."""
    file.seek(0)
    if file.read(len(place.head)) != place.head:
        return None
    file.seek(place.header_at)
    if _without_checksum(file.read(len(place.header))) != place.header:
        return None
    tensor = torch.empty(place.shape, dtype=place.dtype)
    buffer: Any = tensor.reshape(-1).view(torch.uint8).numpy()  # older stubs of numpy do not call it a buffer
    return tensor if file.readinto(buffer) == len(buffer) else None


def _find(path: Path, tensors: dict[str, Tensor], key: str) -> _Place | None:
    """Find the place of a tensor that torch mapped from a file, or None where it is not a plain copy of its bytes."""
    tensor = tensors[key]
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        infos = {info.filename: info for info in archive.infolist()}
        order = next((name for name in infos if name.endswith("/byteorder")), None)
        if order is None or archive.read(order).decode() != sys.byteorder:
            return None
        # One record for each tensor, in the order of their addresses in the memory map.
        records = sorted((i for name, i in infos.items() if "/data/" in name), key=lambda info: info.header_offset)
        names = sorted(tensors, key=lambda name: tensors[name].data_ptr())
        if len(records) != len(names) or not tensor.is_contiguous() or tensor.numel() == 0:
            return None
        record = records[names.index(key)]
        if record.compress_type != zipfile.ZIP_STORED or record.file_size != tensor.nbytes:
            return None
        head = file.read(records[0].header_offset)
        file.seek(record.header_offset)
        header = file.read(30)  # A record's header has a fixed part, which ends with the lengths of the other two.
        header += file.read(int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little"))
    return _Place(head, record.header_offset, _without_checksum(header), tensor.dtype, tensor.shape)


def _without_checksum(header: bytes) -> bytes:
    """Blank the part of a record's header that depends on the tensor's values."""
    return header[:14] + bytes(4) + header[18:]


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what torch and zipfile raise into errors that name the file and what to do."""
    advice = f"`python -m detr_lightning.store verify {path.parent}` lists what is wrong in the folder."
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is gone since the extraction. {advice}") from error
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch has no type of its own for what it cannot read.
        raise InputError(f"{path} does not read: torch finds no whole file there. {advice}") from error
