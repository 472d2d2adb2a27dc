"""The folder on disk: the names of its files, writing them whole or not at all, reading its metadata."""

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

from detr_lightning.errors import InputError
from detr_lightning.format.schema import METADATA, STATE, file_name

REQUIRED = ("image_ids", "num_images", "extract_type", "embedding_keys", "images")
"""Without these keys a metadata.json is not one of this program's."""

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


def is_whole(path: Path, size: int) -> bool:
    """Return whether a file has the size that was recorded for it and its zip directory reads; contents are not."""
    try:
        if os.stat(path).st_size != size:
            return False
        with zipfile.ZipFile(path):
            return True
    except (OSError, zipfile.BadZipFile):
        return False


def read_metadata(folder: Path, *, unfinished: bool = False) -> dict[str, Any]:
    """Return the metadata of a finished extraction.

    Args:
        folder: The output folder.
        unfinished: Read it although a later run on the same folder has not finished.

    Raises:
        FileNotFoundError: There is no such folder, or no finished extraction in it.
        ValueError: Its metadata.json is not one of this program's.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"{folder} {what}. Give the output folder of an extraction.")
    path = folder / METADATA
    if (folder / STATE).exists() and not unfinished:
        raise FileNotFoundError(f"{folder} holds an unfinished extraction. Run the same command again to finish it.")
    if not path.is_file():
        if any(folder.glob("embedding_*.pt")):
            raise FileNotFoundError(
                f"{folder} has embeddings but no {METADATA}: the extraction is unfinished. "
                "Run the same command again to finish it."
            )
        raise FileNotFoundError(f"{folder} has no {METADATA}. Give the output folder of a finished extraction.")
    try:
        metadata = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}). Restore it, or remove it and extract again.") from error
    missing = [key for key in REQUIRED if not isinstance(metadata, dict) or key not in metadata]
    if missing:
        raise InputError(f"{path} is another program's or too old: it lacks {', '.join(missing)}.")
    ids, images = metadata["image_ids"], metadata["images"]
    if not isinstance(ids, list) or not all(type(image_id) is int and 0 <= image_id < 10**12 for image_id in ids):
        raise InputError(f"{path}: image_ids is not a list of image ids (integers of at most 12 digits).")
    if not isinstance(images, list) or not all(isinstance(image, dict) for image in images):
        raise InputError(f"{path}: images is not a list of objects.")
    if [image.get("id") for image in images] != ids:
        raise InputError(f"{path}: images does not list the images of image_ids in their order.")
    keys = metadata["embedding_keys"]
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise InputError(f"{path}: embedding_keys is not a list of names.")
    return dict(metadata)


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
