"""The names of files, and the ids in them."""

from __future__ import annotations

import operator
import os
import re
from typing import SupportsIndex

from detr_lightning.errors import SettingError

METADATA = "metadata.json"
STATE = ".extraction"
"""The subfolder of a run that has not finished; a finished folder has none."""

RUN = "run.json"
"""The file in it that a run writes when it begins: a folder is unfinished as long as it exists."""

TABLE = "embeddings.lance"
"""The Lance dataset in the output folder, where `writer.layout` is `lance`."""

TEMPORARY = ".embedding_*.tmp"
"""Matches every temporary file of this format; those that a dead run leaves are never read."""

ID_DIGITS = 12
MAX_ID: int = 10**ID_DIGITS - 1
"""Image ids are integers from 0 to this, so that they fit into a file's name."""

_NAME = re.compile(rf"embedding_([0-9]{{{ID_DIGITS}}})\.pt")


def is_url(output_dir: str | os.PathLike[str]) -> bool:
    """Return whether an output folder is on an object store, such as `s3://bucket/embeddings`."""
    return "://" in os.fspath(output_dir)


def is_image_id(value: object) -> bool:
    """Return whether a value is an image id: an integer from 0 to `MAX_ID`."""
    if type(value) is int:  # The usual case, and far faster than asking for a protocol.
        return 0 <= value <= MAX_ID
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        return False
    return 0 <= operator.index(value) <= MAX_ID


def file_name(image_id: int) -> str:
    """Return the name of an image's file, `embedding_000000000139.pt` for 139.

    Raises:
        SettingError: The id is no integer, negative, or longer than 12 digits.
    """
    if not is_image_id(image_id):
        raise SettingError(f"image id {image_id!r} cannot name a file: an id is an integer from 0 to {MAX_ID}.")
    return f"embedding_{operator.index(image_id):0{ID_DIGITS}d}.pt"


def image_id_of(name: str) -> int | None:
    """Return the image id in a file's name, or None where the name is not one that `file_name` gives."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None
