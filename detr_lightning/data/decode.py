"""From an opened image file to the pixels that DETR sees: RGB, turned where it is asked for, resized."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F

from detr_lightning.data.formats import ImageFile, open_image
from detr_lightning.data.records import ImageRecord
from detr_lightning.errors import UnreadableImageError, check_choice

BACKENDS = ("pil", "torchvision")
"""The values of `data.image_backend`."""

EXIF = ("ignore", "apply")
"""The values of `data.exif`."""

Processor = Callable[[Image.Image, tuple[int, int]], torch.Tensor]
"""Makes a model's input of an RGB image and a height and width: `[3, height, width]`."""

_ORIENTATION = 0x0112
_MAX_SAMPLE_VALUE = 281
_ROWS = 256
"""Rows of an image of many bits that are converted at a time."""


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF tag by which a viewer turns an image, 1 to 8. No pixel is decoded.

    It is 1 for a TIFF, which Pillow itself turns when it decodes it.
    """
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1  # A PNG without the chunk at its beginning would be decoded to look for one at its end.
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # Whatever damaged metadata raise: the pixels may be whole.
        return 1
    return orientation if orientation in range(1, 9) else 1


def turned_size(image: Image.Image, exif: str) -> tuple[int, int, int]:
    """Return width and height as the model sees an image, and its EXIF orientation."""
    orientation = orientation_of(image)
    width, height = image.size
    return (height, width, orientation) if exif == "apply" and orientation >= 5 else (width, height, orientation)


def read_image(
    source: ImageFile,
    record: ImageRecord,
    size: tuple[int, int],
    backend: str = "pil",
    max_pixels: int | None = None,
    exif: str = "ignore",
    processor: Processor | None = None,
) -> tuple[torch.Tensor, int]:
    """Read an image, make it RGB and resize it.

    Args:
        source: The file, open or by its path, or an image in memory.
        record: The expected content of the file.
        size: Height and width of the result.
        backend: `pil` gives the official pixels bit for bit. `torchvision` is faster for JPEG and stays within 1
            level of 255; it reads other formats, and CMYK, through Pillow.
        max_pixels: See `open_image`.
        exif: `ignore` takes the pixels as they are stored, as the official code does; `apply` turns the image as its
            EXIF tag tells.
        processor: Makes the model's input of an RGB image and a size instead.

    Returns:
        uint8 `[3, height, width]`, whose memory is ordered height, width, channel, or what `processor` returns; and the
        image's EXIF orientation.

    Raises:
        UnreadableImageError: The file is empty, broken, too large or no image, or of another size than the record.
    """
    check_choice("data.image_backend", backend, BACKENDS)
    with open_image(source, max_pixels) as image:
        width, height, orientation = turned_size(image, exif)
        if (width, height) != (record.width, record.height):
            hint = ""
            if exif == "ignore" and orientation >= 5 and (height, width) == (record.width, record.height):
                hint = ": its EXIF tag turns it (data.exif=apply)"
            reason = (
                f"the file is {width}x{height} (width x height), "
                f"but {record.width}x{record.height} was expected from the annotations or an earlier look{hint}"
            )
            raise UnreadableImageError(reason)
        turn = exif == "apply" and orientation > 1
        if backend == "torchvision" and processor is None:
            pixels = _torchvision_pixels(source, image, size, turn)
            if pixels is not None:
                return pixels, orientation
        if turn:
            image = ImageOps.exif_transpose(image)  # noqa: PLW2901
        return (to_pixels(image, size) if processor is None else processor(rgb(image), size)), orientation


def read_rgb(source: ImageFile, exif: str = "ignore") -> Image.Image:
    """Return a whole image in RGB, as a model saw it before it was resized.

    Raises:
        UnreadableImageError: As for `read_image`.
    """
    with open_image(source) as image:
        return rgb(ImageOps.exif_transpose(image) if exif == "apply" else image)


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

    Pillow's own conversion, except for modes of more than 8 bits, which it clips. They follow one rule, whatever values
    an image holds: 16-bit integers keep their high byte, as Pillow does for 16-bit colour, or are scaled by the
    largest value that a TIFF declares (12 bits in 16); floats are 0 to 1. What has no such range is refused.
    Transparency is dropped. Besides the image itself this takes up to 8 bytes per pixel.

    Raises:
        UnreadableImageError: Integers of 32 bits or with a sign, or floats outside of 0 to 1.
    """
    if image.mode == "LAB":
        from PIL import ImageCms

        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None  # it is None only for inPlace
        return converted
    if not image.mode.startswith(("I", "F")):
        return image.convert("RGB")
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # There Pillow reads 16 bits as I.
        raise UnreadableImageError(
            "integers of 32 bits, or with a sign, whose range is not known. Save it with 8 or 16 unsigned bits"
        )
    declared = getattr(image, "tag_v2", {}).get(_MAX_SAMPLE_VALUE)
    top = float(declared[0] if isinstance(declared, tuple) else declared or 2**16 - 1)
    gray = Image.new("L", image.size)
    for start in range(0, image.height, _ROWS):
        box = (0, start, image.width, min(start + _ROWS, image.height))
        values = np.asarray(image.crop(box)).astype(np.float32)
        if image.mode == "F":
            if not (values.min() >= 0 and values.max() <= 1):  # Also where one is NaN.
                raise UnreadableImageError("floats outside of 0 to 1, the range in which they are read. Rescale them")
            top = 1
        values *= 1 / 2**8 if top == 2**16 - 1 else 255 / top
        gray.paste(Image.fromarray(values.clip(0, 255).astype(np.uint8)), box)
    return gray.convert("RGB")


def _torchvision_pixels(
    source: ImageFile, image: Image.Image, size: tuple[int, int], turn: bool
) -> torch.Tensor | None:
    """Decode and resize a JPEG without Pillow; return None for files that are left to it.

    That is every other format: torchvision's PNG decoder ends the process on some damaged files (seen with 0.29).
    """
    if image.format != "JPEG" or image.mode not in ("L", "RGB") or isinstance(source, Image.Image):
        return None
    from torchvision import io

    if isinstance(source, str | os.PathLike):
        content = Path(source).read_bytes()
    else:
        source.seek(0)
        content = source.read()
        source.seek(0)
    data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    try:
        pixels = io.decode_jpeg(data, mode=io.ImageReadMode.RGB, apply_exif_orientation=turn)
    except RuntimeError:  # Pillow decides whether the file is broken, and says how
        return None
    batch = pixels.permute(1, 2, 0).contiguous()[None].permute(0, 3, 1, 2)  # in channels-last strides, also for torch
    return F.interpolate(batch, size=size, mode="bilinear", antialias=True)[0]  # [1, 3, h, w] -> [3, h, w]
