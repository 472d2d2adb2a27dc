"""The one reader of COCO JSON, for images, for validation and for matching. Anyone may have made the file."""

from __future__ import annotations

import json
import os
import posixpath
import re
import reprlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from detr_lightning.data.records import ImageRecord
from detr_lightning.errors import InputError
from detr_lightning.format.names import MAX_ID

MAX_SIDE = 2**31 - 1
"""The longest side that an image file can state."""

MAX_NUMBER = 1e12
"""No number of pixels in an annotation is larger. NaN and infinity are not smaller either."""

_OUTSIDE = re.compile(r"[/\\]|[A-Za-z]:|(.*[/\\])?\.\.([/\\]|$)", re.DOTALL)
"""An absolute path, also one of Windows, or one with `..` in it."""

_INTEGER = re.compile(r"\s*[+-]?[0-9]{1,18}\s*")
_NUMBER = re.compile(r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?\s*")

_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = 120


@dataclass(frozen=True)
class COCOFile:
    """The content of a COCO annotation file, each value in its one form.

    Attributes:
        path: The file.
        images: In the file's order; width and height are 0 where the file leaves one of them out.
        categories: The name of each category id.
        annotations: With an integer `image_id` and `category_id`, a finite `bbox` `[x, y, width, height]`, an `area`
            (the box's where the file has none) and `iscrowd` 0 or 1. `id` is the file's own: text, repeated or missing.
            Empty where they were not asked for.
    """

    path: Path
    images: list[ImageRecord]
    categories: dict[int, str]
    annotations: list[dict[str, Any]]

    def ground_truth(self, image_ids: Collection[int]) -> dict[str, Any]:
        """Return what is needed to evaluate detections in these images, as a COCO dataset.

        Raises:
            InputError: None of the images has an annotation.
        """
        wanted = frozenset(image_ids)
        annotations = [annotation for annotation in self.annotations if annotation["image_id"] in wanted]
        if not annotations:
            raise InputError(
                f"{self.path} has no annotation for any of the {len(wanted)} images, "
                "so there is nothing to compare with."
            )
        return {
            "images": [{"id": image_id} for image_id in sorted(wanted)],
            "categories": [{"id": number, "name": name} for number, name in self.categories.items()],
            "annotations": annotations,
        }


def read_coco_file(
    source: str | os.PathLike[str],
    annotations: Literal["skip", "boxes", "whole"] = "skip",
    setting: str = "data.annotation_file",
) -> COCOFile:
    """Read and check a COCO annotation file, in any encoding of Unicode.

    What has one meaning is normalised: integers and numbers written as text, integers with a decimal point, a missing
    `area` or `iscrowd`. What has none is refused: NaN, infinity, a repeated image id, a box that is none.

    Args:
        source: The file.
        annotations: `skip` leaves them unread, `boxes` checks them and drops their segmentation, `whole` keeps every
            field and also takes images without a `file_name`.
        setting: What the user knows the file as.

    Raises:
        FileNotFoundError: The file is not there.
        InputError: The file is not COCO's, or an entry is unusable; the message names the entry.
    """
    path = Path(source)
    document = _load_json(path, setting, _trim(annotations))
    images = _images(path, document, named=annotations != "whole")
    categories = _categories(path, document)
    if annotations == "skip":
        return COCOFile(path, images, categories, [])
    entries = document.get("annotations")
    if not isinstance(entries, list):
        raise InputError(f"{path} has no list 'annotations': it is not a COCO annotation file with boxes.")
    if entries and not categories:
        raise InputError(
            f"{path} is not a COCO annotation file with boxes: 'categories' is missing or empty. "
            'It names the category ids, such as [{"id": 1, "name": "person"}].'
        )
    index, entry = 0, None
    try:
        for index, entry in enumerate(entries):  # noqa: B007
            _normalise(entry, categories)
    except InputError as error:
        number = f" (id {_shown.repr(entry['id'])})" if isinstance(entry, dict) and "id" in entry else ""
        raise InputError(f"{path}: annotations[{index}]{number}{error}") from None
    return COCOFile(path, images, categories, entries)


def compare_names(model: Mapping[int, str], annotated: Mapping[int, str]) -> tuple[str, bool]:
    """Compare the names of a model's categories with those in annotations, id by id.

    Returns:
        The first differences in words, empty where all names agree, and whether none agrees. A model without names
        differs from nothing.
    """
    if not model:
        return "", False
    ids = {_plain(name): number for number, name in model.items()}
    differences = []
    for number, name in annotated.items():
        if _plain(model.get(number, "")) == _plain(name):
            continue
        other = ids.get(_plain(name))
        differences.append(
            f"{number} is {name!r} in the annotations and {repr(model[number]) if number in model else 'no category'} "
            f"in the model" + ("" if other is None else f", which has {name!r} at {other}")
        )
    more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
    return "; ".join(differences[:3]) + more, 0 < len(differences) == len(annotated)


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name.strip().casefold())


def _trim(annotations: str) -> Callable[[dict[str, Any]], dict[str, Any] | None] | None:
    """Return what reduces each object of the file while it is parsed: most of a file is what is not needed here."""
    if annotations == "whole":
        return None
    skip = annotations == "skip"

    def trim(entry: dict[str, Any]) -> dict[str, Any] | None:
        if "file_name" in entry:
            if len(entry) > 4 and "image_id" not in entry:
                return {name: entry[name] for name in ("id", "file_name", "width", "height") if name in entry}
        elif "bbox" in entry and "image_id" in entry:
            if skip:
                return None
            entry.pop("segmentation", None)
        return entry

    return trim


def _load_json(source: Path, setting: str, hook: Callable[[dict[str, Any]], Any] | None) -> dict[str, Any]:
    if not source.is_file():
        what = "is not a file" if source.exists() else "does not exist"
        raise FileNotFoundError(f"{setting} {what}: {source}. Give COCO's instances_*.json, or a file in its format.")
    try:
        document = json.loads(source.read_bytes(), object_hook=hook)
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is not JSON that can be read: {error}. Save it as UTF-8.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{source} is not JSON that can be read ({error}), so it is not a COCO annotation file."
        ) from error
    if not isinstance(document, dict):
        hint = "; a list is a file of results, not of annotations" if isinstance(document, list) else ""
        raise InputError(f"{source} holds a {type(document).__name__}, but COCO annotations are an object{hint}.")
    return document


def _images(source: Path, document: dict[str, Any], named: bool) -> list[ImageRecord]:
    entries = document.get("images")
    if not isinstance(entries, list):
        keys = f"Its keys: {', '.join(map(_shown.repr, list(document)[:8]))}." if document else "It is empty."
        raise InputError(f"{source} has no list 'images'; it is not a COCO annotation file. {keys}")
    records: dict[int, ImageRecord] = {}
    for index, entry in enumerate(entries):
        try:
            record = _record(entry, named)
        except InputError as error:
            raise InputError(f"{source}: images[{index}]{error}") from None
        first = records.setdefault(record.image_id, record)
        if first is not record:
            raise InputError(
                f"{source}: image id {record.image_id} occurs twice, for {_shown.repr(first.file_name)} and "
                f"{_shown.repr(record.file_name)}. Each image needs its own id."
            )
    return list(records.values())


def _record(entry: Any, named: bool) -> ImageRecord:
    if not isinstance(entry, dict):
        raise InputError(f" is {_shown.repr(entry)}, but must be an object with 'id' and 'file_name'.")
    image_id = _integer(entry.get("id"))
    if image_id is None or not 0 <= image_id <= MAX_ID:
        raise InputError(f": 'id' is {_shown.repr(entry.get('id'))}, but must be an integer from 0 to {MAX_ID}.")
    sides = []
    for name in ("width", "height"):
        value = entry.get(name)
        side = 0 if value is None else _integer(value)
        if side is None or not (value is None or 0 < side <= MAX_SIDE):
            raise InputError(f": '{name}' is {_shown.repr(value)}, but must be an integer of at least 1.")
        sides.append(side)
    width, height = sides if all(sides) else (0, 0)
    file_name = entry.get("file_name")
    return ImageRecord(image_id, "" if file_name is None and not named else _file_name(file_name), width, height)


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


def _categories(source: Path, document: dict[str, Any]) -> dict[int, str]:
    entries = document.get("categories") or []
    if not isinstance(entries, list):
        raise InputError(f"{source}: 'categories' is {_shown.repr(entries)}, but must be a list.")
    names: dict[int, str] = {}
    for index, entry in enumerate(entries):
        number, name = (_integer(entry.get("id")), entry.get("name")) if isinstance(entry, dict) else (None, None)
        if number is None or not isinstance(name, str):
            raise InputError(
                f"{source}: categories[{index}] is {_shown.repr(entry)}, but must have an integer 'id' and a 'name'."
            )
        if names.setdefault(number, name) != name:
            raise InputError(f"{source}: category id {number} occurs twice, for {names[number]!r} and {name!r}.")
    return names


def _normalise(entry: Any, categories: Collection[int]) -> None:
    """Give an annotation's values their one form, in place."""
    if not isinstance(entry, dict):
        raise InputError(f" is {_shown.repr(entry)}, but must be an object with 'image_id', 'category_id' and 'bbox'.")
    for name in ("image_id", "category_id"):
        number = _integer(entry.get(name))
        if number is None:
            raise InputError(f": '{name}' {_found(entry, name)}, but must be an integer.")
        entry[name] = number
    if entry["category_id"] not in categories:
        raise InputError(f" has the unknown category {entry['category_id']}: 'categories' does not list it.")
    box = entry.get("bbox")
    numbers = [_number(value) for value in box] if isinstance(box, list) else []
    if len(numbers) != 4 or None in numbers or min(numbers[2:]) < 0:  # type: ignore[type-var,operator]
        raise InputError(
            f": 'bbox' {_found(entry, 'bbox')}, but must be [x, y, width, height]: "
            "four finite numbers, the last two not negative."
        )
    entry["bbox"] = numbers
    area = entry.get("area")
    entry["area"] = numbers[2] * numbers[3] if area in (None, "") else _number(area)  # type: ignore[operator]
    if entry["area"] is None or entry["area"] < 0:
        raise InputError(f": 'area' is {_shown.repr(area)}, but must be a finite number of at least 0.")
    crowd = entry.get("iscrowd")
    entry["iscrowd"] = int(crowd or 0) if crowd in (None, "", False, True) else _integer(crowd)
    if entry["iscrowd"] not in (0, 1):
        raise InputError(f": 'iscrowd' is {_shown.repr(crowd)}, but must be 0 or 1.")


def _integer(value: Any) -> int | None:
    """Return the integer that a value is, also as text or with a decimal point, or None."""
    if type(value) is int:
        return value
    if isinstance(value, str) and _INTEGER.fullmatch(value):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return None


def _number(value: Any) -> float | None:
    """Return the finite number that a value is, also as text, or None."""
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_NUMBER:
        return None
    return value


def _found(entry: dict[str, Any], name: str) -> str:
    return f"is {_shown.repr(entry[name])}" if name in entry else "is missing"
