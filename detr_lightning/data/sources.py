"""Sources of images. They list names and ids, and the sizes that annotations state; headers have all others."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from PIL import Image

from detr_lightning.data.coco import COCOFile, read_coco_file
from detr_lightning.data.decode import rgb
from detr_lightning.data.files import find_file, image_folder, open_file
from detr_lightning.data.formats import ImageFile
from detr_lightning.data.records import ImageRecord
from detr_lightning.errors import InputError, SettingError, SettingTypeError, UnreadableImageError


class Known(Protocol):
    """An image as an earlier run recorded it."""

    @property
    def image_id(self) -> int:
        """The image's id."""


NONE_KNOWN: Mapping[str, Known] = {}


class ImageSource(Protocol):
    """A set of images. It is sent to the data workers."""

    categories: dict[int, str]

    def find(self, known: Mapping[str, Known]) -> list[ImageRecord]:
        """Return all images by id. An image whose size is only in its header has a width of 0.

        Args:
            known: Images of earlier runs by file name. A source that numbers its images keeps their ids.
        """

    def open(self, record: ImageRecord) -> ImageFile:
        """Open an image.

        Raises:
            FileNotFoundError: The image does not exist.
            UnreadableImageError: The image cannot be opened.
        """


class COCOImages:
    """The images of a COCO annotation file.

    Args:
        image_dir: The folder that the file names are relative to.
        annotation_file: COCO's `instances_*.json`, or a file in its format.

    Attributes:
        categories: The name of each category id, after `find`.
    """

    def __init__(self, image_dir: str | Path, annotation_file: str | Path) -> None:
        self.image_dir = str(image_dir)
        self.annotation_file = str(annotation_file)
        self.categories: dict[int, str] = {}
        self._content: COCOFile | None = None

    def find(self, known: Mapping[str, Known] = NONE_KNOWN) -> list[ImageRecord]:
        """Return all images by id, with the sizes in the annotation file.

        Raises:
            FileNotFoundError: The folder or the file does not exist.
            InputError: The file is not in COCO's format, an entry cannot be used, or an id occurs twice.
        """
        image_folder(self.image_dir)
        content = self._content or read_coco_file(self.annotation_file)
        if not content.images:
            raise InputError(f"{self.annotation_file} lists no images: 'images' is empty.")
        self.categories = content.categories
        return sorted(content.images, key=lambda record: record.image_id)

    def check_folder(self, records: Sequence[ImageRecord]) -> None:
        """Refuse a folder that is not the one of the annotations.

        Raises:
            FileNotFoundError: The folder has none of the images.
        """
        if not any(os.path.isfile(find_file(self.image_dir, record.file_name)) for record in records):
            raise FileNotFoundError(
                f"none of the {len(records)} images of {self.annotation_file} is in {self.image_dir}, such as "
                f"{records[0].file_name!r}. Set data.image_dir to the folder that their names are relative to."
            )

    def read_annotations(self) -> None:
        """Read the annotations as well. Called before `find`, so that the file is read once.

        Raises:
            FileNotFoundError: The file does not exist.
            InputError: The file is not in COCO's format, or an entry cannot be used.
        """
        self._content = self._content or read_coco_file(self.annotation_file, "boxes")

    def ground_truth(self, image_ids: Iterable[int]) -> dict[str, Any]:
        """Return the annotations of these images as a COCO dataset, and discard all others.

        Raises:
            FileNotFoundError: The file does not exist.
            InputError: The file is not in COCO's format, an entry cannot be used, or no image has an annotation.
        """
        self.read_annotations()
        assert self._content is not None
        content, self._content = self._content, None
        return content.ground_truth(frozenset(image_ids))

    def open(self, record: ImageRecord) -> ImageFile:
        """Open an image; see `open_file`."""
        return open_file(self.image_dir, record)


Listed: TypeAlias = "str | os.PathLike[str] | Image.Image"


class ListedImages:
    """Images in any folders or in memory, numbered from 1.

    Args:
        images: Paths and PIL images.

    Raises:
        SettingTypeError: One of them is neither a path nor a PIL image.
        SettingError: The list is empty.
    """

    def __init__(self, images: Sequence[Listed]) -> None:
        if not images:
            raise SettingError("images: the list is empty.")
        for number, image in enumerate(images, start=1):
            if not isinstance(image, str | os.PathLike | Image.Image):
                raise SettingTypeError(
                    f"images: number {number} is of type {type(image).__name__}, but must be a path or a PIL image. "
                    "PIL.Image.fromarray converts an array."
                )
        self.images = [
            image if isinstance(image, Image.Image) else Path(image).expanduser().absolute() for image in images
        ]
        self.categories: dict[int, str] = {}

    def find(self, known: Mapping[str, Known] = NONE_KNOWN) -> list[ImageRecord]:
        """Return all images by id. An image in memory is named after its content, to recognize it in a resumed run.

        Raises:
            FileNotFoundError: One of the paths is not a file.
        """
        records = []
        for number, image in enumerate(self.images, start=1):
            if isinstance(image, Path):
                if not image.is_file():
                    raise FileNotFoundError(f"images: number {number}, {image}, is not a file.")
                names = str(image), os.path.relpath(image)  # Earlier versions recorded relative paths as given.
                name = next((name for name in names if name in known), names[0])
                records.append(ImageRecord(number, name, 0, 0))
                continue
            try:
                digest = f" ({hashlib.sha256(rgb(image).tobytes()).hexdigest()[:16]})"
            except (OSError, UnreadableImageError):  # Reported when its pixels are read.
                digest = ""
            records.append(ImageRecord(number, f"image {number}{digest}", 0, 0))
        return records

    def open(self, record: ImageRecord) -> ImageFile:
        """Open an image."""
        return self.images[record.image_id - 1]
