"""The images of a store, and the crops that show an object."""

from __future__ import annotations

import contextlib
import os
import threading

from PIL import Image

from detr_lightning.data.decode import read_rgb
from detr_lightning.errors import InputError
from detr_lightning.store.store import EmbeddingStore
from detr_lightning.system import restore_settings

_LIMIT = threading.Lock()
"""Held while Pillow's limit of pixels, which is one for the whole process, is a store's own."""


def open_picture(store: EmbeddingStore, image_id: int, image_dir: str | os.PathLike[str] | None = None) -> Image.Image:
    """Return an image of a store in RGB, in the orientation and size that the store's boxes refer to.

    Raises:
        UnknownImageError: The store has no such image.
        FileNotFoundError: The image file does not exist.
        UnreadableImageError: It cannot be read.
        InputError: It has another size than at the extraction.
    """
    path = store.image_path(int(image_id), image_dir)
    picture = read_picture(store, path)
    height, width = store.entry(image_id).size
    if picture.size != (width, height):
        raise InputError(
            f"{path} is {picture.width}x{picture.height} (width x height), but was {width}x{height} at the "
            "extraction. Give image_dir, the folder with the images as they were."
        )
    return picture


def read_picture(store: EmbeddingStore, image: str | os.PathLike[str] | Image.Image) -> Image.Image:
    """Return any image in RGB, rotated by its EXIF tag if the store's images were, of at most as many pixels as they.

    Raises:
        UnreadableImageError: It cannot be read.
    """
    metadata = store.metadata_file
    limit = metadata.max_image_pixels
    with contextlib.nullcontext() if limit is None else _LIMIT, restore_settings():
        return read_rgb(image, metadata.settings.preprocessing.get("exif", "ignore"), limit)


def square_of(size: tuple[int, int], x1: float, y1: float, x2: float, y2: float) -> tuple[int, int, int]:
    """Return left, top and side of the square around a box, moved into an image of this width and height if it fits."""
    width, height = size
    half = max(0.6 * max(x2 - x1, y2 - y1), 4)
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    x = min(max(x, half), width - half) if 2 * half <= width else width / 2
    y = min(max(y, half), height - half) if 2 * half <= height else height / 2
    return round(x - half), round(y - half), max(round(2 * half), 1)


def square_around(picture: Image.Image, x1: float, y1: float, x2: float, y2: float) -> Image.Image:
    """Return the square around a box; gray outside the image."""
    left, top, side = square_of(picture.size, x1, y1, x2, y2)
    square = Image.new("RGB", (side, side), "#e8e8e8")
    visible = (max(left, 0), max(top, 0), min(left + side, picture.width), min(top + side, picture.height))
    square.paste(picture.crop(visible), (visible[0] - left, visible[1] - top))
    return square
