"""From an image file to the pixels that DETR sees: found, opened, made RGB, resized."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.nn import functional as F

from detr_lightning.data.records import ImageRecord
from detr_lightning.errors import UnreadableImageError, check_choice

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM", "JPEG2000")
"""What is decoded, whatever a file's extension says. Pillow knows more, but hands EPS to an external program."""

_QUIET = ((UserWarning, r"PIL\."), (DeprecationWarning, r"torchvision\.io\."))


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


BACKENDS = ("pil", "torchvision")
"""What `data.image_backend` may be."""


def read_pixels(
    path: Path,
    record: ImageRecord,
    size: tuple[int, int],
    backend: str = "pil",
    max_pixels: int | None = None,
) -> torch.Tensor:
    """Read an image, make it RGB and resize it. Orientation tags are ignored, as in the official code.

    Args:
        path: The file, as `locate` returns it.
        record: What the file should hold.
        size: Height and width of the result.
        backend: `pil` gives the official pixels bit for bit. `torchvision` is faster for JPEG and stays within 1
            level of 255; it reads other formats, and CMYK, through Pillow.
        max_pixels: See `open_image`.

    Returns:
        uint8 `[3, height, width]`, whose memory is ordered height, width, channel.

    Raises:
        UnreadableImageError: The file is empty, broken, too large or no image, or of another size than the record.
    """
    check_choice("data.image_backend", backend, BACKENDS)
    with open_image(path, max_pixels) as image:
        _check_size(path, image, record)
        pixels = _torchvision_pixels(path, image, size) if backend == "torchvision" else None
        return to_pixels(image, size) if pixels is None else pixels


def to_pixels(image: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """Make an image RGB and resize it, as the official code does.

    Args:
        image: An image of any mode.
        size: Height and width of the result.

    Returns:
        uint8 `[3, height, width]`, whose memory is ordered height, width, channel.
    """
    height, width = size
    resized = rgb(image).resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)  # [H, W, 3] -> [3, H, W], a view


def rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB.

    Pillow's own conversion, except for modes of more than 8 bits, which it clips: 16-bit values keep their high byte,
    as Pillow does for 16-bit colour, wider integers theirs; floats are taken as 0 to 1 where none is larger, else as 0
    to 255. Transparency is dropped.
    """
    if image.mode == "LAB":
        from PIL import ImageCms

        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None  # it is None only for inPlace
        return converted
    if not image.mode.startswith(("I", "F")):
        return image.convert("RGB")
    values = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0, neginf=0)
    peak = np.max(values)
    if image.mode == "F":
        values *= 255 if peak <= 1 else 1
    else:
        values /= 2**8 if peak < 2**16 else 2**23
    return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB")


def _check_size(path: Path, image: Image.Image, record: ImageRecord) -> None:
    if image.size != (record.width, record.height):
        reason = (
            f"the file is {image.width}x{image.height} (width x height), "
            f"but {record.width}x{record.height} was expected from the annotations or an earlier look"
        )
        raise UnreadableImageError(f"{path}: {reason}", reason)


def _torchvision_pixels(path: Path, image: Image.Image, size: tuple[int, int]) -> torch.Tensor | None:
    """Decode and resize a JPEG without Pillow; return None for what is left to it.

    That is every other format: torchvision's PNG decoder ends the process on some damaged files (seen with 0.29).
    """
    if image.format != "JPEG" or image.mode not in ("L", "RGB"):
        return None
    from torchvision import io

    data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    try:
        pixels = io.decode_jpeg(data, mode=io.ImageReadMode.RGB)
    except RuntimeError:  # Pillow decides whether the file is broken, and says how
        return None
    batch = pixels.permute(1, 2, 0).contiguous()[None].permute(0, 3, 1, 2)  # in channels-last strides, also for torch
    return F.interpolate(batch, size=size, mode="bilinear", antialias=True)[0]  # [1, 3, h, w] -> [3, h, w]
