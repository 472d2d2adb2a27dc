"""The reader of COCO JSON for images, validation and matching. The file may come from any source."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from detr_lightning.data.coco_entries import image_record, integer, normalise_annotation, shown
from detr_lightning.data.records import ImageRecord
from detr_lightning.errors import InputError


@dataclass(frozen=True)
class COCOFile:
    """The content of a COCO annotation file, with normalised values.

    Attributes:
        path: The file.
        images: The images in the file's order; width and height are 0 if the file lacks one of them.
        categories: The name of each category id.
        annotations: The annotations, with an integer `image_id` and `category_id`, a finite `bbox`
            `[x, y, width, height]`, an `area` (by default that of the box) and `iscrowd` 0 or 1. `id` is unchecked: it
            may be text, repeated or missing. Empty if the annotations were not requested.
    """

    path: Path
    images: list[ImageRecord]
    categories: dict[int, str]
    annotations: list[dict[str, Any]]

    def ground_truth(self, image_ids: Collection[int]) -> dict[str, Any]:
        """Return the annotations of these images as a COCO dataset, to evaluate detections.

        Raises:
            InputError: None of the images has an annotation.
        """
        wanted = frozenset(image_ids)
        annotations = [annotation for annotation in self.annotations if annotation["image_id"] in wanted]
        if not annotations:
            raise InputError(
                f"{self.path} has no annotations for any of the {len(wanted)} images, "
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

    Values with a clear meaning are normalised: integers and numbers written as text, integers with a decimal point, a
    missing `area` or `iscrowd`. All others are refused: NaN, infinity, a repeated image id, an unusable box.

    Args:
        source: The file.
        annotations: `skip` leaves them unread, `boxes` checks them and drops their segmentation, `whole` keeps every
            field and also takes images without a `file_name`.
        setting: The user's name for the file.

    Raises:
        FileNotFoundError: The file does not exist.
        InputError: The file is not in COCO's format, or an entry cannot be used; the message names the entry.
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
            normalise_annotation(entry, categories)
    except InputError as error:
        number = f" (id {shown(entry['id'])})" if isinstance(entry, dict) and "id" in entry else ""
        raise InputError(f"{path}: annotations[{index}]{number}{error}") from None
    return COCOFile(path, images, categories, entries)


def _trim(annotations: str) -> Callable[[dict[str, Any]], dict[str, Any] | None] | None:
    """Return a function that trims each object of the file while it is parsed: most of a file is not needed here."""
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
        problem = "is not a file" if source.exists() else "does not exist"
        raise FileNotFoundError(f"{setting} {problem}: {source}. Give COCO's instances_*.json or a file in its format.")
    try:
        document = json.loads(source.read_bytes(), object_hook=hook)
    except UnicodeDecodeError as error:
        raise InputError(f"{source} cannot be read as JSON: {error}. Save it as UTF-8.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source} cannot be read as JSON ({error}), so it is not a COCO annotation file.") from error
    if not isinstance(document, dict):
        hint = "; a list is the format of results, not of annotations" if isinstance(document, list) else ""
        raise InputError(f"{source} contains a {type(document).__name__}, but COCO annotations are an object{hint}.")
    return document


def _images(source: Path, document: dict[str, Any], named: bool) -> list[ImageRecord]:
    entries = document.get("images")
    if not isinstance(entries, list):
        keys = f"Its keys: {', '.join(map(shown, list(document)[:8]))}." if document else "It is empty."
        raise InputError(f"{source} has no list 'images'; it is not a COCO annotation file. {keys}")
    records: dict[int, ImageRecord] = {}
    for index, entry in enumerate(entries):
        try:
            record = image_record(entry, named)
        except InputError as error:
            raise InputError(f"{source}: images[{index}]{error}") from None
        first = records.setdefault(record.image_id, record)
        if first is not record:
            raise InputError(
                f"{source}: image id {record.image_id} occurs twice, for {shown(first.file_name)} and "
                f"{shown(record.file_name)}. Each image needs its own id."
            )
    return list(records.values())


def _categories(source: Path, document: dict[str, Any]) -> dict[int, str]:
    entries = document.get("categories") or []
    if not isinstance(entries, list):
        raise InputError(f"{source}: 'categories' is {shown(entries)}, but must be a list.")
    names: dict[int, str] = {}
    for index, entry in enumerate(entries):
        number, name = (integer(entry.get("id")), entry.get("name")) if isinstance(entry, dict) else (None, None)
        if number is None or not isinstance(name, str):
            raise InputError(
                f"{source}: categories[{index}] is {shown(entry)}, but must have an integer 'id' and a 'name'."
            )
        if names.setdefault(number, name) != name:
            raise InputError(f"{source}: category id {number} occurs twice, for {names[number]!r} and {name!r}.")
    return names
