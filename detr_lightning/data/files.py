"""The one way in which an image file is found and opened."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, UnidentifiedImageError

if TYPE_CHECKING:
    from detr_lightning.data.images import ImageRecord

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM", "JPEG2000")
"""What is decoded, whatever a file's extension says. Pillow knows more, but hands EPS to an external program."""

_QUIET = ((UserWarning, r"PIL\."), (DeprecationWarning, r"torchvision\.io\."))


class UnreadableImageError(ValueError):
    """An image file that cannot be used. `reason` says why, without the file's name."""

    def __init__(self, message: str, reason: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason or message


def image_folder(image_dir: str | Path) -> Path:
    """Return the folder as a path.

    Raises:
        FileNotFoundError: It does not exist, or is no folder.
    """
    folder = Path(image_dir)
    if not image_dir or not folder.is_dir():
        what = "is empty" if not image_dir else "is not a folder" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"data.image_dir {what}: {image_dir}")
    return folder


def locate(image_dir: str | Path, record: ImageRecord) -> Path:
    """Return where an image's file really lies: inside the folder, all symbolic links followed.

    Raises:
        FileNotFoundError: There is no such file.
        UnreadableImageError: A link on the way leads out of the folder.
    """
    root = os.path.realpath(image_dir)
    path = os.path.realpath(os.path.join(root, record.file_name))
    if not path.startswith(os.path.join(root, "")):
        reason = f"a symbolic link leads out of the image folder, to {path}; name the folder that holds the file itself"
        raise UnreadableImageError(f"{record.file_name!r} in {image_dir}: {reason}", reason)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"image {record.image_id} has no file {record.file_name!r} in {image_dir}")
    return Path(path)


@contextmanager
def open_image(path: Path, max_pixels: int | None = None) -> Iterator[Image.Image]:
    """Open an image file; whatever goes wrong until it is closed again, decoding included, becomes one kind of error.

    Args:
        path: The file.
        max_pixels: Pixels above which an image is refused as a decompression bomb. Sets Pillow's own limit, for the
            whole process; None leaves it as it is.

    Raises:
        UnreadableImageError: An empty, broken or too large file, or none of `FORMATS`.
    """
    if max_pixels is not None:
        Image.MAX_IMAGE_PIXELS = max_pixels
    _silence()
    try:
        with Image.open(path, formats=FORMATS) as image:
            limit = Image.MAX_IMAGE_PIXELS  # Pillow itself only warns up to twice its limit
            if limit is not None and image.width * image.height > limit:
                raise Image.DecompressionBombError
            yield image
    except (UnreadableImageError, MemoryError):
        raise
    except Exception as error:
        reason = _reason(error, path)
        raise UnreadableImageError(f"{path}: {reason}", reason) from error


def _reason(error: Exception, path: Path) -> str:
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"more than {Image.MAX_IMAGE_PIXELS} pixels: refused as a decompression bomb (data.max_image_pixels)"
    if os.path.isfile(path) and not os.path.getsize(path):
        return "empty file (0 bytes)"
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or its header is broken"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    return f"cannot be decoded ({type(error).__name__}: {error})"


def _silence() -> None:
    """Keep Pillow's remarks on odd metadata quiet, and torchvision's on the future of its decoders.

    `warnings.catch_warnings` is not safe in threads, and makes warnings that others show once appear again and again.
    """
    for category, module in _QUIET:
        if ("ignore", None, category, re.compile(module), 0) not in warnings.filters:
            warnings.filterwarnings("ignore", category=category, module=module)
