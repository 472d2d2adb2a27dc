"""A COCO annotation file: its images and categories, checked entry by entry, since anyone may have made it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import posixpath
import re
import reprlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from detr_lightning.errors import InputError

MAX_ID = 10**12 - 1
"""The largest image id: names of output files have 12 digits."""

MAX_SIDE = 2**31 - 1
"""The longest side that an image file can state."""

Entry = tuple[int, str, int, int]
"""An image's id, file name, width and height; the last two 0 where the file leaves one of them out."""

_OUTSIDE = re.compile(r"[/\\]|[A-Za-z]:|(.*[/\\])?\.\.([/\\]|$)", re.DOTALL)
"""An absolute path, also one of Windows, or one with `..` in it."""

_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = 120


def parse_annotations(source: Path) -> tuple[list[Entry], dict[int, str]]:
    """Read the images and the categories of a COCO file.

    Returns:
        The images in the file's order, and the name of each category id.

    Raises:
        FileNotFoundError: The file is not there.
        ValueError: The file is not COCO's, an entry is unusable, or an image id occurs twice.
    """
    document = _load_json(source)
    images = document.get("images")
    if not isinstance(images, list):
        raise InputError(f"{source} has no list 'images'; it is not a COCO annotation file. {_keys(document)}")
    if not images:
        raise InputError(f"{source} lists no images: 'images' is empty.")
    entries: dict[int, Entry] = {}
    for index, image in enumerate(images):
        try:
            entry = _entry(image)
        except ValueError as error:
            raise InputError(f"{source}: images[{index}]{error}") from None
        first = entries.setdefault(entry[0], entry)
        if first is not entry:
            raise InputError(
                f"{source}: image id {entry[0]} occurs twice, for {_shown.repr(first[1])} and {_shown.repr(entry[1])}. "
                "Each image needs its own id."
            )
    return list(entries.values()), _categories(document, source)


def ground_truth(annotation_file: str, image_ids: Collection[int]) -> Any:
    """Return the annotations of a COCO file as a `pycocotools.coco.COCO`.

    An annotation without `iscrowd` is no crowd, and one without `area` has its box's: files that are not COCO's own
    often leave them out.

    Raises:
        ValueError: There is none for these images, or one is not COCO's.
    """
    from pycocotools.coco import COCO

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            content = COCO(annotation_file)
        for annotation in content.anns.values():
            _x, _y, width, height = annotation["bbox"]
            annotation.setdefault("area", width * height)
            annotation.setdefault("iscrowd", 0)
        annotated = {annotation["image_id"] for annotation in content.anns.values()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"{annotation_file} has annotations that are not COCO's ({type(error).__name__}: {error}). "
            "Each needs id, image_id, category_id and bbox."
        ) from error
    if annotated.isdisjoint(image_ids):
        raise InputError(
            f"{annotation_file} has no annotation for any of the {len(image_ids)} images, "
            "so there is nothing to compare with."
        )
    return content


def _load_json(source: Path) -> dict[str, Any]:
    if not source.is_file():
        what = "is not a file" if source.exists() else "does not exist"
        raise FileNotFoundError(f"data.annotation_file {what}: {source}")
    try:
        document = json.loads(source.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source} is not JSON that can be read ({error}).") from error
    if not isinstance(document, dict):
        hint = "; a list is a file of results, not of annotations" if isinstance(document, list) else ""
        raise InputError(f"{source} holds a {type(document).__name__}, but COCO annotations are an object{hint}.")
    return document


def _entry(entry: Any) -> Entry:
    if not isinstance(entry, dict):
        raise InputError(f" is {_shown.repr(entry)}, but must be an object with 'id' and 'file_name'.")
    image_id = entry.get("id")
    if type(image_id) is not int or not 0 <= image_id <= MAX_ID:
        raise InputError(f": 'id' is {_shown.repr(image_id)}, but must be an integer from 0 to {MAX_ID}.")
    width, height = entry.get("width"), entry.get("height")
    for name, side in (("width", width), ("height", height)):
        if side is not None and (type(side) is not int or not 0 < side <= MAX_SIDE):
            raise InputError(f": '{name}' is {_shown.repr(side)}, but must be an integer of at least 1.")
    if width is None or height is None:
        width = height = 0
    return image_id, _file_name(entry.get("file_name")), width, height


def _file_name(name: Any) -> str:
    if not isinstance(name, str):
        raise InputError(f": 'file_name' is {_shown.repr(name)}, but must be text.")
    if _OUTSIDE.match(name) or not name.strip("./"):
        raise InputError(f": 'file_name' is {_shown.repr(name)}, but must be a path inside the image folder.")
    try:
        valid = b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        valid = False
    if not valid:
        raise InputError(f": 'file_name' is {_shown.repr(name)}, which no file can be called.")
    return posixpath.normpath(name)


def _categories(document: dict[str, Any], source: Path) -> dict[int, str]:
    categories = document.get("categories") or []
    if not isinstance(categories, list):
        raise InputError(f"{source}: 'categories' is {_shown.repr(categories)}, but must be a list.")
    names: dict[int, str] = {}
    for index, entry in enumerate(categories):
        number, name = (entry.get("id"), entry.get("name")) if isinstance(entry, dict) else (None, None)
        if type(number) is not int or not isinstance(name, str):
            raise InputError(
                f"{source}: categories[{index}] is {_shown.repr(entry)}, but must have an integer 'id' and a 'name'."
            )
        names[number] = name
    return names


def _keys(document: dict[str, Any]) -> str:
    return f"Its keys: {', '.join(map(_shown.repr, list(document)[:8]))}." if document else "It is empty."
