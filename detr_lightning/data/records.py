"""An image before it is read."""

from __future__ import annotations

from dataclasses import dataclass

Size = tuple[int, int]
"""Height and width."""

Failure = tuple["ImageRecord", str]
"""An image that cannot be used, and why."""


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """An image before it is read.

    Attributes:
        image_id: COCO's id, or the number that a folder's image was given.
        file_name: Path relative to the image folder, with forward slashes.
        width: Pixels from left to right; 0 where the file could not be read to find out.
        height: Pixels from top to bottom; 0 in the same case.
        orientation: The EXIF tag by which a viewer turns the image, 1 to 8; 1 also where the header was not read.
    """

    image_id: int
    file_name: str
    width: int
    height: int
    orientation: int = 1

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width
