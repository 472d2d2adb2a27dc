"""An image before it is read."""

from __future__ import annotations

from dataclasses import dataclass

Failure = tuple["ImageRecord", str]
"""An image that cannot be used, and the reason."""


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """An image before it is read.

    Attributes:
        image_id: COCO's id, or the number assigned to an image of a folder.
        file_name: The path relative to the image folder, with forward slashes.
        width: The width in pixels; 0 if unknown, since the header was not read or is unreadable.
        height: The height in pixels; 0 in the same case.
        orientation: The EXIF orientation, 1 to 8; 1 also if the header was not read.
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
