"""Writes files atomically: whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from detr_lightning.format.names import file_name

_JSON_CHECKSUM = b',\n  "checksum": '
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Saved(NamedTuple):
    """The size and the checksum of a file that was written."""

    bytes: int
    checksum: str


def save_tensors(folder: Path, image_id: int, tensors: Mapping[str, Tensor]) -> Saved:
    """Write one image's tensors atomically, to a file whose content survives a crash of the machine.

    The file's name survives a crash once `fsync_folder` has been called; one call is enough for many files.

    Args:
        folder: An existing folder.
        image_id: The image; its file is replaced if it exists.
        tensors: Tensors on any device, views included. Each is saved contiguous, on the CPU and in its own storage.

    Returns:
        The file's size in bytes, and its checksum.

    Raises:
        OSError: The file cannot be written; see `replacing`.
    """
    path = Path(folder) / file_name(image_id)
    storages: set[int] = set()
    owned = {key: _own(tensor, storages) for key, tensor in tensors.items()}
    # To memory first: when torch itself writes to a full disk, it hides the system's error behind one of its own.
    data = io.BytesIO()
    torch.save(owned, data)
    with replacing(path, data.tell()) as file:
        return Saved(file.write(data.getbuffer()), checksum_of(data.getbuffer()))


def checksum_of(data: bytes | memoryview) -> str:
    """Return the `checksum` of a file: the first 16 hex digits of the sha256 of its bytes."""
    return hashlib.sha256(data).hexdigest()[:16]


def write_json(path: Path, content: Mapping[str, Any], *, checksum: bool = False) -> None:
    """Write a JSON object, formatted by `to_json_bytes`, as `save_tensors` writes tensors. Replaces an existing file.

    Raises:
        OSError: The file cannot be written; see `replacing`.
        ValueError: A number is NaN or infinite, which JSON does not support.
    """
    data = to_json_bytes(content, checksum=checksum)
    with replacing(path, len(data)) as file:
        file.write(data)


def to_json_bytes(content: Mapping[str, Any], *, checksum: bool = False) -> bytes:
    """Format a JSON object for people to read: one line per key, and one per object of a list.

    Args:
        content: The object.
        checksum: End it with a `checksum` of everything before, which `json_is_unchanged` checks.

    Raises:
        ValueError: A number is NaN or infinite, which JSON does not support.
    """
    text = ",\n".join(f"  {json.dumps(key)}: {_json_value(value)}" for key, value in content.items())
    data = f"{{\n{text}".encode()
    if checksum:
        data += _JSON_CHECKSUM + f'"{checksum_of(data)}"'.encode()
    return data + b"\n}\n"


def json_is_unchanged(data: bytes) -> bool:
    """Return whether a JSON file still matches the `checksum` at its end."""
    end = data.rfind(_JSON_CHECKSUM)
    return end >= 0 and data[end:] == _JSON_CHECKSUM + f'"{checksum_of(data[:end])}"\n}}\n'.encode()


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is dense, contiguous and alone in its storage, as every tensor on disk is."""
    dense = tensor.layout is torch.strided and not tensor.is_quantized
    return dense and tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Return whether two plain tensors have the same dtype, shape and bytes: NaN equals itself, and -0.0 is not 0.0."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder survive a crash of the machine."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # Some network file systems cannot, and need not.
            raise
    finally:
        os.close(handle)


@contextmanager
def replacing(path: Path, needed: int = 0) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces `path` when the block ends, and is removed if the block fails.

    Args:
        path: The file to write, in an existing folder.
        needed: Its approximate size in bytes, for the message if the disk is full.

    Yields:
        The file to write to. Its permissions follow the umask.

    Raises:
        OSError: The file cannot be written. For a full disk, a quota or a size limit, the message names the path, the
            bytes needed and the bytes free.
    """
    path = Path(path)
    stem = path.stem.removeprefix("embedding_")[:100]
    temporary = path.with_name(f".embedding_{stem}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _FULL:
            raise OSError(error.errno, _full_disk_message(path, needed, error.errno)) from error
        raise


def _full_disk_message(path: Path, needed: int, number: int) -> str:
    """Return the message for a file that does not fit: no space, no inodes, or a quota or size limit."""
    disk = os.statvfs(path.parent)
    if number == errno.ENOSPC and disk.f_files and not disk.f_favail:
        return (
            f"{os.strerror(number)}: {path} cannot be created: its file system has no inodes left, that is, no room "
            "for more files. Delete some, or choose an output_dir elsewhere, then run the same command again."
        )
    return (
        f"{os.strerror(number)}: {path} needs about {needed} bytes and the disk has "
        f"{disk.f_bavail * disk.f_frsize} free. Free some space or lift the limit, then run the same command again."
    )


def _own(tensor: Tensor, storages: set[int]) -> Tensor:
    """Return the tensor on the CPU, plain and in a storage that no other tensor uses; copied only if needed."""
    tensor = tensor.detach().cpu()
    if not is_plain(tensor) or tensor.data_ptr() in storages:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    storages.add(tensor.data_ptr())
    return tensor


def _json_value(value: Any) -> str:
    """Format a value for people to read, but with the fast encoder: `indent` is slow for a million images."""
    encode = json.JSONEncoder(allow_nan=False).encode
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n    " + ",\n    ".join(map(encode, value)) + "\n  ]"
    if isinstance(value, dict) and value:
        return json.dumps(value, indent=2, allow_nan=False).replace("\n", "\n  ")
    return encode(value)
