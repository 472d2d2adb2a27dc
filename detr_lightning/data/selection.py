"""Selection of images: by ids or file names, the first ones, or a random sample."""

from __future__ import annotations

import bisect
import operator
import os
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from detr_lightning.data.records import ImageRecord
from detr_lightning.errors import InputError, SettingError, SettingTypeError, count, did_you_mean


def select(
    records: Sequence[ImageRecord],
    image_ids: Iterable[int | str] | None = None,
    limit: int | None = None,
    shuffle_seed: int | None = None,
) -> list[ImageRecord]:
    """Return a subset of the images, by id.

    Args:
        records: All images.
        image_ids: The ids or file names of the images to select; all by default.
        limit: Select only this many of them, the first by id.
        shuffle_seed: Select those `limit` images at random instead; the same seed gives the same images.

    Raises:
        SettingError: No image has an id or name, `image_ids` is empty, `limit` is below 1, or a seed has no `limit`.
    """
    chosen = sorted(records, key=lambda record: record.image_id)
    if image_ids is not None:
        wanted = set(image_ids)
        if not wanted:
            raise SettingError("data.image_ids is empty. Name at least one id, or leave it null for all images.")
        ids, names = [record.image_id for record in chosen], {record.file_name for record in chosen}
        unknown_names = sorted(name for name in wanted - names if isinstance(name, str))
        if unknown_names:
            hint = did_you_mean(unknown_names[0], names)
            raise SettingError(f"data.image_ids names {unknown_names[0]!r}, but no image has that file name.{hint}")
        unknown = sorted(number for number in wanted.difference(ids) if not isinstance(number, str))
        if unknown:
            raise SettingError(_unknown_ids(unknown, ids))
        chosen = [record for record in chosen if record.image_id in wanted or record.file_name in wanted]
    if limit is None:
        if shuffle_seed is not None:
            raise SettingError("data.shuffle_seed selects data.limit images at random: set data.limit too.")
        return chosen
    if limit < 1:
        raise SettingError(f"data.limit is {limit}, but must be at least 1, or null for all images.")
    if shuffle_seed is not None:
        chosen = random.Random(shuffle_seed).sample(chosen, min(limit, len(chosen)))
        chosen.sort(key=lambda record: record.image_id)
    return chosen[:limit]


def plain_image_ids(image_ids: Any) -> list[int | str] | str | None:
    """Return ids and file names in a list that JSON can hold, or the name of the file that lists them.

    Args:
        image_ids: A collection of any type, in which ids are integers of any type, such as NumPy's; a file; or None.

    Raises:
        SettingTypeError: It is something else.
    """
    if image_ids is None:
        return None
    if isinstance(image_ids, str | os.PathLike):
        return os.fspath(image_ids)
    try:
        return [one if isinstance(one, str) else operator.index(one) for one in image_ids]
    except TypeError as error:
        raise SettingTypeError(
            f"data.image_ids: {error}. Give a list of ids and file names, or a text file with one per line."
        ) from error


def read_image_ids(source: str | os.PathLike[str]) -> list[int | str]:
    """Read ids or file names, one per line.

    Raises:
        FileNotFoundError: The file does not exist.
        InputError: The file is not text.
    """
    path = Path(source).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"data.image_ids names {path}, which is not a file. Give a list, or a file with one id per line."
        )
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise InputError(
            f"data.image_ids: {path} is not text ({error}). It must list one id or file name per line."
        ) from error
    return [int(line) if line.isascii() and line.isdigit() else line for line in lines if line]


def _unknown_ids(unknown: list[int], known: list[int]) -> str:
    some = ", ".join(map(str, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
    place = bisect.bisect(known, unknown[0])
    nearest = " and ".join(map(str, known[max(place - 1, 0) : place + 1]))
    ids = count(len(unknown), "id")
    return f"data.image_ids names {ids} that no image has: {some}. Nearest to {unknown[0]}: {nearest}."
