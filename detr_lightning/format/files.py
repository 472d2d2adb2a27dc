"""Writing files whole or not at all, and telling a whole one."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import uuid
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from detr_lightning.format.names import file_name

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def save_tensors(folder: Path, image_id: int, tensors: Mapping[str, Tensor]) -> int:
    """Write one image's tensors, so that its file appears whole or not at all, and survives a crash of the machine.

    The name itself survives a crash once `fsync_folder` was called, which may be done for many files at once.

    Args:
        folder: An existing folder.
        image_id: The image; its file is replaced if it is there.
        tensors: On any device, views included; each is stored contiguous, on the CPU and alone in its storage.

    Returns:
        The file's size in bytes.

    Raises:
        OSError: The file cannot be written; a full disk names the path, the bytes needed and the bytes free.
    """
    path = Path(folder) / file_name(image_id)
    storages: set[int] = set()
    owned = {key: _own(tensor, storages) for key, tensor in tensors.items()}
    # In memory first: writing to the disk itself, torch hides the error of a full disk behind one of its own.
    data = io.BytesIO()
    torch.save(owned, data)
    with replacing(path, data.tell()) as file:
        return file.write(data.getbuffer())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object like `save_tensors` writes tensors: a line for each key, and for each object of a list.

    Raises:
        OSError: As for `save_tensors`.
        ValueError: A number that JSON does not know (NaN, infinity).
    """
    text = ",\n".join(f"  {json.dumps(key)}: {_json_value(value)}" for key, value in content.items())
    data = f"{{\n{text}\n}}\n".encode()
    with replacing(path, len(data)) as file:
        file.write(data)


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


def is_whole(path: Path, size: int | None) -> bool:
    """Return whether a file has the size that was recorded for it and its zip directory reads; contents are not."""
    try:
        if os.stat(path).st_size != size:
            return False
        with zipfile.ZipFile(path):
            return True
    except (OSError, zipfile.BadZipFile):
        return False


@contextmanager
def replacing(path: Path, needed: int = 0) -> Iterator[BinaryIO]:
    """Open a new file that takes the place of `path` when the block ends, and leaves no trace when it fails.

    Args:
        path: The file to write, in an existing folder.
        needed: About its size in bytes, for the message when the disk is full.

    Yields:
        The file to write to. Its modes follow the umask.

    Raises:
        OSError: As the system says; for a full disk, a quota or a size limit with the bytes needed and free.
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
            free = shutil.disk_usage(path.parent).free
            reason = os.strerror(error.errno)
            raise OSError(
                error.errno,
                f"{reason}: {path} needs about {needed} bytes and the disk has {free} free. "
                "Free some space or lift the limit, then run the same command again.",
            ) from error
        raise


def _own(tensor: Tensor, storages: set[int]) -> Tensor:
    """Return the tensor contiguous, on the CPU and alone in its storage; copied only where it is not."""
    tensor = tensor.detach().cpu().contiguous()
    storage = tensor.untyped_storage()
    if storage.nbytes() != tensor.nbytes or storage.data_ptr() in storages:
        tensor = tensor.clone()
    storages.add(tensor.untyped_storage().data_ptr())
    return tensor


def _json_value(value: Any) -> str:
    """Return JSON that people can read and that the fast encoder wrote: `indent` alone is slow for a million images."""
    encode = json.JSONEncoder(allow_nan=False).encode
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[\n    " + ",\n    ".join(map(encode, value)) + "\n  ]"
    if isinstance(value, dict) and value:
        return json.dumps(value, indent=2, allow_nan=False).replace("\n", "\n  ")
    return encode(value)
