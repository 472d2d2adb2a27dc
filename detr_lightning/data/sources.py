"""Which images there are: the records of a COCO file or of a folder."""

from __future__ import annotations

import bisect
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from detr_lightning.data.coco import read_coco_file
from detr_lightning.data.decode import image_folder, locate, open_image
from detr_lightning.data.records import Failure, ImageRecord
from detr_lightning.errors import InputError, SettingError, UnreadableImageError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
"""What counts as an image in a folder without annotations, in upper or lower case."""


def read_coco(
    image_dir: str | Path,
    annotation_file: str | Path,
    failures: list[Failure] | None = None,
    max_pixels: int | None = None,
) -> tuple[list[ImageRecord], dict[int, str]]:
    """Read the images and categories of a COCO file.

    No image is opened, except for those whose `width` or `height` the file leaves out: theirs comes from the header.

    Args:
        image_dir: The folder that the file names are relative to.
        annotation_file: COCO's JSON: an object with `images`, and `categories` where they are known.
        failures: Where given, images whose header had to be read and could not be are added here instead of raised.
        max_pixels: See `open_image`.

    Returns:
        The images in the order of their ids, and the name of each category id.

    Raises:
        FileNotFoundError: The folder or the file is not there.
        ValueError: The file is not COCO's, an entry is unusable, or an id occurs twice.
        UnreadableImageError: A header that had to be read, without `failures`.
    """
    folder = image_folder(image_dir)
    content = read_coco_file(annotation_file)
    if not content.images:
        raise InputError(f"{annotation_file} lists no images: 'images' is empty.")
    records = {record.image_id: record for record in content.images}
    unmeasured = [record for record in records.values() if not record.width]
    for record, reason in _measure(folder, unmeasured, max_pixels):
        if reason and failures is None:
            raise UnreadableImageError(f"{record.file_name!r} in {folder}: {reason}", reason)
        if reason and failures is not None:
            failures.append((record, reason))
            del records[record.image_id]
        else:
            records[record.image_id] = record
    return [records[image_id] for image_id in sorted(records)], content.categories


def read_folder(
    image_dir: str | Path, known: Mapping[str, int] | None = None, max_pixels: int | None = None
) -> tuple[list[ImageRecord], list[Failure]]:
    """Find the images of a folder and its subfolders, without hidden ones, and read their sizes from the headers.

    Where the stem of every file is an integer of at most 12 digits, that is its id. Else the files are numbered from 1
    in the order of their relative paths.

    Args:
        image_dir: The folder.
        known: Ids that an earlier run gave, by file name: these files keep them, and new ones take the next free ones.
        max_pixels: See `open_image`.

    Returns:
        The images in the order of their ids, and those whose header cannot be read (width and height 0), with the
        reason of each.

    Raises:
        FileNotFoundError: The folder is not there.
        ValueError: No image, two files with one id, or a linked subfolder that leads out of the folder.
    """
    folder, known = image_folder(image_dir), known or {}
    names = sorted(_walk(folder))
    if not names:
        raise SettingError(f"No image in {folder} or its subfolders: looked for {', '.join(EXTENSIONS)}.")
    ids = _folder_ids(names, known)
    records, failures = [], []
    unmeasured = sorted((ImageRecord(ids[name], name, 0, 0) for name in names), key=lambda record: record.image_id)
    for record, reason in _measure(folder, unmeasured, max_pixels):
        if reason:
            failures.append((record, reason))
        else:
            records.append(record)
    return records, failures


def select(
    records: Sequence[ImageRecord], image_ids: Iterable[int] | None = None, limit: int | None = None
) -> list[ImageRecord]:
    """Return a subset: the images with these ids, of those the first `limit` by id.

    Raises:
        ValueError: An id that no image has, no id at all, or a limit below 1.
    """
    chosen = {record.image_id: record for record in sorted(records, key=lambda record: record.image_id)}
    if image_ids is not None:
        wanted = set(image_ids)
        if not wanted:
            raise SettingError("data.image_ids is empty. Name at least one id, or leave it null for all images.")
        unknown = sorted(wanted - chosen.keys())
        if unknown:
            raise SettingError(_unknown_ids(unknown, list(chosen)))
        chosen = {image_id: record for image_id, record in chosen.items() if image_id in wanted}
    if limit is not None and limit < 1:
        raise SettingError(f"data.limit is {limit}; it must be at least 1, or null for all images.")
    return list(itertools.islice(chosen.values(), limit))


def _measure(
    folder: Path, records: list[ImageRecord], max_pixels: int | None
) -> Iterator[tuple[ImageRecord, str | None]]:
    """Read sizes from headers, in parallel; yield each record with its size, or as it was with a reason."""

    def measure(part: list[ImageRecord]) -> list[tuple[ImageRecord, str | None]]:
        return [_measured(folder, record, max_pixels) for record in part]

    parts = [records[start : start + 256] for start in range(0, len(records), 256)]
    if parts:
        with ThreadPoolExecutor(8) as pool:
            yield from itertools.chain.from_iterable(pool.map(measure, parts))


def _measured(folder: Path, record: ImageRecord, max_pixels: int | None) -> tuple[ImageRecord, str | None]:
    try:
        with open_image(locate(folder, record), max_pixels) as image:
            return replace(record, width=image.width, height=image.height), None
    except UnreadableImageError as error:
        return record, error.reason
    except FileNotFoundError as error:
        return record, str(error)


def _walk(folder: Path) -> Iterator[str]:
    """Yield the relative POSIX path of each image in a folder."""
    pending = [""]
    while pending:
        parent = pending.pop()
        with os.scandir(os.path.join(folder, parent)) as entries:
            for entry in entries:
                name = parent + entry.name
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    pending.append(name + "/")
                elif entry.is_dir():
                    _check_linked_folder(folder, name)
                elif entry.name.lower().endswith(EXTENSIONS):
                    yield name


def _check_linked_folder(folder: Path, name: str) -> None:
    """Let a linked subfolder pass whose images are found anyway, and refuse one whose images would be missing."""
    target = os.path.realpath(os.path.join(folder, name))
    root = os.path.realpath(folder)
    if target != root and not target.startswith(os.path.join(root, "")):
        raise SettingError(
            f"{name!r} in {folder} is a symbolic link out of that folder, to {target}. "
            "Move it away, or set data.image_dir to a folder that holds all images itself."
        )


def _folder_ids(names: list[str], known: Mapping[str, int]) -> dict[str, int]:
    stems = {name: _integer(name) for name in [*names, *known]}
    if all(stem is not None and known.get(name, stem) == stem for name, stem in stems.items()):
        owner: dict[int | None, str] = {}
        for name in names:
            first = owner.setdefault(stems[name], name)
            if first != name:
                raise SettingError(
                    f"{first!r} and {name!r} both have the id {stems[name]}. "
                    "Rename one of them, or name the images in an annotation file."
                )
        return {name: image_id for image_id, name in owner.items() if image_id is not None}
    used = set(known.values())
    free = (number for number in itertools.count(1) if number not in used)
    return {name: known[name] if name in known else next(free) for name in names}


def _integer(name: str) -> int | None:
    stem = name.rpartition("/")[2].rpartition(".")[0]
    return int(stem) if stem.isascii() and stem.isdigit() and len(stem.lstrip("0")) <= 12 else None


def _unknown_ids(unknown: list[int], known: list[int]) -> str:
    some = ", ".join(map(str, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
    place = bisect.bisect(known, unknown[0])
    nearest = " and ".join(map(str, known[max(place - 1, 0) : place + 1]))
    return f"data.image_ids names {len(unknown)} ids that no image has: {some}. Nearest to {unknown[0]}: {nearest}."
