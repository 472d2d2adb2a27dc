"""File names, and the image ids in them."""

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
"""The file that a run writes into that subfolder when it begins. As long as it exists, the folder is unfinished."""

TABLE = "embeddings.lance"
"""The Lance dataset in the output folder, if `writer.layout` is `lance`."""

TEMPORARY = ".embedding_*.tmp"
"""Matches every temporary file of this format; those left behind by a killed run are never read."""

ID_DIGITS = 12
MAX_ID: int = 10**ID_DIGITS - 1
"""The largest image id. Ids are integers from 0, and have to fit into a file name."""

_NAME = re.compile(rf"embedding_([0-9]{{{ID_DIGITS}}})\.pt")


def is_url(output_dir: str | os.PathLike[str]) -> bool:
    """Return whether an output folder is on an object store, such as `s3://bucket/embeddings`."""
    return "://" in os.fspath(output_dir)


def is_image_id(value: object) -> bool:
    """Return whether a value is an image id: an integer from 0 to `MAX_ID`."""
    if type(value) is int:  # The usual case, and far faster than the check for a protocol.
        return 0 <= value <= MAX_ID
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        return False
    return 0 <= operator.index(value) <= MAX_ID


def file_name(image_id: int) -> str:
    """Return the name of an image's file, `embedding_000000000139.pt` for 139.

    Raises:
        SettingError: The id is not an integer, is negative, or has more than 12 digits.
    """
    if not is_image_id(image_id):
        raise SettingError(f"image id {image_id!r} cannot name a file: an id is an integer from 0 to {MAX_ID}.")
    return f"embedding_{operator.index(image_id):0{ID_DIGITS}d}.pt"


def image_id_of(name: str) -> int | None:
    """Return the image id in a name made by `file_name`, or None for any other name."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None
