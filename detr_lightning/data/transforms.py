"""From an image file to the pixels that DETR sees: read, made RGB, resized."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from detr_lightning.data.files import UnreadableImageError, open_image
from detr_lightning.embeddings import one_of

if TYPE_CHECKING:
    from detr_lightning.data.images import ImageRecord

BACKENDS = ("pil", "torchvision")
"""What `data.image_backend` may be."""


def resized_size(size: tuple[int, int], short_side: int = 800, long_side: int = 1333) -> tuple[int, int]:
    """Return the size at which DETR sees an image.

    The rule of official DETR's datasets/transforms.py, roundings included: the short side becomes `short_side`, or less
    where the long side would pass `long_side`; the long side follows, truncated. It may still pass `long_side` by a
    pixel. Hugging Face and torchvision's `max_size` round differently and give other sizes for some images.

    Args:
        size: Height and width of the image.
        short_side: What the short side becomes.
        long_side: What the long side should not pass.

    Returns:
        Height and width after resizing.

    Raises:
        ValueError: The image is so thin that no pixel of its short side would be left.
    """
    height, width = size
    short, long = min(size), max(size)
    if long / short * short_side > long_side:
        short_side = round(long_side * float(short) / long)
    if short_side < 1:
        raise ValueError(f"an image of {width}x{height} (width x height) is too thin: resized it would have no pixels")
    if short == short_side:
        return height, width
    long_side = int(short_side * long / short)
    return (long_side, short_side) if width < height else (short_side, long_side)


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
    one_of("data.image_backend", backend, BACKENDS)
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
