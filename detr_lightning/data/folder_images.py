"""The images of a folder, and their ids."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from detr_lightning.data.files import image_folder, list_images, open_file
from detr_lightning.data.formats import OTHER_EXTENSIONS, ImageFile, image_extensions
from detr_lightning.data.records import ImageRecord
from detr_lightning.data.sources import NONE_KNOWN, Known
from detr_lightning.errors import SettingError
from detr_lightning.format.names import ID_DIGITS


class FolderImages:
    """The images of a folder and its subfolders, without hidden ones.

    If the stem of every file is an integer of at most 12 digits, the stems are the ids. Otherwise the files are
    numbered from 1 in the order of their relative paths.

    Args:
        image_dir: The folder.

    Attributes:
        left_out: The number of files with each other extension.
    """

    def __init__(self, image_dir: str | Path) -> None:
        self.image_dir = str(image_dir)
        self.categories: dict[int, str] = {}
        self.left_out: Counter[str] = Counter()

    def find(self, known: Mapping[str, Known] = NONE_KNOWN) -> list[ImageRecord]:
        """Return all images by id.

        Raises:
            FileNotFoundError: The folder does not exist.
            SettingError: The folder has no images, two files have the same id, or a linked subfolder is hidden or
                outside the folder.
        """
        extensions = image_extensions()
        names, self.left_out = list_images(image_folder(self.image_dir), extensions)
        if not names:
            others = f"; it has {_counted(self.left_out)}" if self.left_out else ""
            raise SettingError(
                f"No images in {self.image_dir} or its subfolders: looked for {', '.join(extensions)}{others}."
            )
        ids = _folder_ids(names, {name: entry.image_id for name, entry in known.items()})
        return sorted((ImageRecord(ids[name], name, 0, 0) for name in names), key=lambda record: record.image_id)

    @property
    def images_left_out(self) -> str:
        """The number of images that were left out, by extension, such as `11 .heic, 1 .jfif`."""
        return _counted({name: number for name, number in self.left_out.items() if name in OTHER_EXTENSIONS})

    def open(self, record: ImageRecord) -> ImageFile:
        """Open an image; see `open_file`."""
        return open_file(self.image_dir, record)


def _counted(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {name or 'without extension'}" for name, number in sorted(numbers.items()))


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
    return int(stem) if stem.isascii() and stem.isdigit() and len(stem.lstrip("0")) <= ID_DIGITS else None
