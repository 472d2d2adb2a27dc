"""The entries of a COCO file: their values are normalised, and an error names each value that cannot be used."""

from __future__ import annotations

import os
import posixpath
import re
import reprlib
from collections.abc import Collection
from typing import Any

from detr_lightning.data.records import ImageRecord
from detr_lightning.errors import InputError
from detr_lightning.format.names import MAX_ID

MAX_SIDE = 2**31 - 1
"""The longest side that an image file can declare."""

MAX_NUMBER = 1e12
"""The upper limit of the numbers in an annotation. It also excludes NaN and infinity."""

_OUTSIDE = re.compile(r"[/\\]|[A-Za-z]:|(.*[/\\])?\.\.([/\\]|$)", re.DOTALL)
"""Matches an absolute path, also on Windows, or one that contains `..`."""

_INTEGER = re.compile(r"\s*[+-]?[0-9]{1,18}\s*")
_NUMBER = re.compile(r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?\s*")

_reprs = reprlib.Repr()
_reprs.maxstring = _reprs.maxother = 120
shown = _reprs.repr
"""Returns a value as messages show it, shortened."""


def image_record(entry: Any, named: bool) -> ImageRecord:
    """Return the image that an entry of `images` describes; width and height are 0 if one of them is missing.

    Args:
        entry: The entry.
        named: Whether the entry must have a `file_name`.

    Raises:
        InputError: A value cannot be used; the message continues after the name of the entry.
    """
    if not isinstance(entry, dict):
        raise InputError(f" is {shown(entry)}, but must be an object with 'id' and 'file_name'.")
    image_id = integer(entry.get("id"))
    if image_id is None or not 0 <= image_id <= MAX_ID:
        raise InputError(f": 'id' is {shown(entry.get('id'))}, but must be an integer from 0 to {MAX_ID}.")
    sides = []
    for name in ("width", "height"):
        value = entry.get(name)
        side = 0 if value is None else integer(value)
        if side is None or not (value is None or 0 < side <= MAX_SIDE):
            raise InputError(f": '{name}' is {shown(value)}, but must be an integer of at least 1.")
        sides.append(side)
    width, height = sides if all(sides) else (0, 0)
    file_name = entry.get("file_name")
    return ImageRecord(image_id, "" if file_name is None and not named else _file_name(file_name), width, height)


def _file_name(name: Any) -> str:
    if not isinstance(name, str):
        raise InputError(f": 'file_name' is {shown(name)}, but must be a string.")
    if _OUTSIDE.match(name) or not name.strip("./"):
        raise InputError(f": 'file_name' is {shown(name)}, but must be a path inside the image folder.")
    try:
        valid = b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        valid = False
    if not valid:
        raise InputError(f": 'file_name' is {shown(name)}, which is not a valid file name.")
    return posixpath.normpath(name)


def normalise_annotation(entry: Any, categories: Collection[int]) -> None:
    """Normalise the values of an entry of `annotations`, in place.

    Args:
        entry: The entry.
        categories: The known category ids.

    Raises:
        InputError: A value cannot be used; the message continues after the name of the entry.
    """
    if not isinstance(entry, dict):
        raise InputError(f" is {shown(entry)}, but must be an object with 'image_id', 'category_id' and 'bbox'.")
    for name in ("image_id", "category_id"):
        number = integer(entry.get(name))
        if number is None:
            raise InputError(f": '{name}' {_found(entry, name)}, but must be an integer.")
        entry[name] = number
    if entry["category_id"] not in categories:
        raise InputError(f" has the unknown category {entry['category_id']}: 'categories' does not list it.")
    box = entry.get("bbox")
    values: list[Any] = box if isinstance(box, list) else []
    numbers = [side for value in values if (side := _number(value)) is not None]
    if not len(numbers) == len(values) == 4 or min(numbers[2:]) < 0:
        raise InputError(
            f": 'bbox' {_found(entry, 'bbox')}, but must be [x, y, width, height]: "
            "four finite numbers, the last two not negative."
        )
    entry["bbox"] = numbers
    area = entry.get("area")
    entry["area"] = numbers[2] * numbers[3] if area in (None, "") else _number(area)
    if entry["area"] is None or entry["area"] < 0:
        raise InputError(f": 'area' is {shown(area)}, but must be a finite number of at least 0.")
    crowd = entry.get("iscrowd")
    entry["iscrowd"] = int(crowd or 0) if crowd in (None, "", False, True) else integer(crowd)
    if entry["iscrowd"] not in (0, 1):
        raise InputError(f": 'iscrowd' is {shown(crowd)}, but must be 0 or 1.")


def integer(value: Any) -> int | None:
    """Convert a value to an integer, also from text or a float without a fraction; return None if it is not one."""
    if type(value) is int:
        return value
    if isinstance(value, str) and _INTEGER.fullmatch(value):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return None


def _number(value: Any) -> float | None:
    """Convert a value to a finite number, also from text; return None if it is not one."""
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_NUMBER:
        return None
    return value


def _found(entry: dict[str, Any], name: str) -> str:
    return f"is {shown(entry[name])}" if name in entry else "is missing"
