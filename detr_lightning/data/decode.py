"""Decodes an image file into the pixels that DETR sees: RGB, turned by its EXIF tag if requested, and resized."""

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
"""Makes a model's input, `[3, height, width]`, from an RGB image and a height and width."""

_ORIENTATION = 0x0112
_MAX_SAMPLE_VALUE = 281
_ROWS = 256
"""The number of rows converted at a time in images of more than 8 bits."""


def orientation_of(image: Image.Image) -> int:
    """Return an image's EXIF orientation, 1 to 8, without decoding pixels.

    It is 1 for a TIFF, which Pillow itself turns when decoding.
    """
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1  # Without an exif chunk at its beginning, a PNG would be decoded to look for one at its end.
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # Damaged metadata can raise anything; the pixels may be intact.
        return 1
    return orientation if orientation in range(1, 9) else 1


def turned_size(image: Image.Image, exif: str) -> tuple[int, int, int]:
    """Return an image's width and height as the model sees it, and its EXIF orientation."""
    orientation = orientation_of(image)
    width, height = image.size
    return (height, width, orientation) if exif == "apply" and orientation >= 5 else (width, height, orientation)


def upright(image: Image.Image, exif: str) -> Image.Image:
    """Return an image as the model sees it: turned by its EXIF tag if `exif` is `apply`."""
    return ImageOps.exif_transpose(image) if exif == "apply" and orientation_of(image) > 1 else image


def read_image(
    source: ImageFile,
    record: ImageRecord,
    size: tuple[int, int],
    backend: str = "pil",
    max_pixels: int | None = None,
    exif: str = "ignore",
    processor: Processor | None = None,
) -> tuple[torch.Tensor, int]:
    """Read an image, convert it to RGB and resize it.

    Args:
        source: An open file, a path, or an image in memory.
        record: The image's record, whose size the file must have.
        size: Height and width of the result.
        backend: `pil` gives the official pixels bit for bit. `torchvision` is faster for JPEG and within 1 of 255
            levels; other formats, CMYK, and images that are turned still go through Pillow.
        max_pixels: See `open_image`.
        exif: `ignore` takes the pixels as stored, as the official code does; `apply` turns the image by its EXIF tag.
        processor: Makes the model's input from an RGB image and a size instead.

    Returns:
        uint8 `[3, height, width]`, whose memory is ordered height, width, channel, or what `processor` returns; and the
        image's EXIF orientation.

    Raises:
        UnreadableImageError: The file is empty, broken, too large or not an image, or has another size than the record.
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
                f"but {record.width}x{record.height} was expected from the annotations or an earlier read{hint}"
            )
            raise UnreadableImageError(reason)
        turn = exif == "apply" and orientation > 1
        # torchvision finds fewer orientation tags than Pillow, so an image to be turned is left to Pillow.
        if backend == "torchvision" and processor is None and not turn:
            pixels = _torchvision_pixels(source, image, size)
            if pixels is not None:
                return pixels, orientation
        seen = upright(image, exif)
        return (to_pixels(seen, size) if processor is None else processor(rgb(seen), size)), orientation


def read_rgb(source: ImageFile, exif: str = "ignore", max_pixels: int | None = None) -> Image.Image:
    """Return an image in RGB as a model sees it, but not resized, and without its metadata, such as the EXIF tag.

    The arguments are those of `read_image`.

    Raises:
        UnreadableImageError: The file is empty, broken, too large or not an image.
    """
    with open_image(source, max_pixels) as image:
        picture = rgb(upright(image, exif))
        picture.info.clear()
        return picture


def to_pixels(image: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """Convert an image to RGB and resize it, as the official code does.

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

    Uses Pillow's own conversion, except for modes of more than 8 bits, which it clips. Their scale does not depend on
    the image's values: 16-bit integers keep their high byte, as Pillow does for 16-bit colour, or are scaled by the
    largest value that a TIFF declares (12 bits in 16); floats range from 0 to 1. Other ranges are refused.
    Transparency is dropped. This takes up to 8 bytes per pixel in addition to the image itself.

    Raises:
        UnreadableImageError: The image has signed or 32-bit integers, or floats outside of 0 to 1.
    """
    if image.mode == "LAB":
        from PIL import ImageCms

        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert converted is not None  # it is None only for inPlace
        return converted
    if not image.mode.startswith(("I", "F")):
        return image.convert("RGB")
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # In these formats, Pillow reads 16 bits as I.
        raise UnreadableImageError(
            "signed or 32-bit integers, whose range is not known. Save it with 8 or 16 unsigned bits"
        )
    declared = getattr(image, "tag_v2", {}).get(_MAX_SAMPLE_VALUE)
    top = float(declared[0] if isinstance(declared, tuple) else declared or 2**16 - 1)
    gray = Image.new("L", image.size)
    for start in range(0, image.height, _ROWS):
        box = (0, start, image.width, min(start + _ROWS, image.height))
        values = np.asarray(image.crop(box)).astype(np.float32)
        if image.mode == "F":
            if not (values.min() >= 0 and values.max() <= 1):  # Also refuses NaN.
                raise UnreadableImageError("floats outside of 0 to 1, the supported range. Rescale them")
            top = 1
        values *= 1 / 2**8 if top == 2**16 - 1 else 255 / top
        gray.paste(Image.fromarray(values.clip(0, 255).astype(np.uint8)), box)
    return gray.convert("RGB")


def _torchvision_pixels(source: ImageFile, image: Image.Image, size: tuple[int, int]) -> torch.Tensor | None:
    """Decode and resize a JPEG without Pillow; return None for files that are left to Pillow.

    Those are all other formats: torchvision's PNG decoder crashes the process on some damaged files (seen with 0.29).
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
        pixels = io.decode_jpeg(data, mode=io.ImageReadMode.RGB)
    except RuntimeError:  # Pillow decides whether and how the file is broken
        return None
    batch = pixels.permute(1, 2, 0).contiguous()[None].permute(0, 3, 1, 2)  # channels-last strides
    return F.interpolate(batch, size=size, mode="bilinear", antialias=True)[0]  # [1, 3, h, w] -> [3, h, w]
