"""Preprocessing: from an image to the size and the pixels of a model's input."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from detr_lightning.errors import SettingError
from detr_lightning.format.keys import Size

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""ImageNet's colour statistics, for pixels in `[0, 1]`."""


@dataclass(frozen=True)
class Preprocessing:
    """The preprocessing that a model was trained with. The defaults are the official DETR's.

    Either `short_side` is set, or `height` and `width` are.

    Attributes:
        short_side: The length to which the short side of an image is resized.
        long_side: The upper limit of the long side; None if there is none.
        height: The height that every image is stretched to.
        width: The width that every image is stretched to.
        mean: The mean of each channel, which is subtracted from pixels in `[0, 1]`.
        std: The standard deviation of each channel, by which the result is divided.
        rescale_first: Whether pixels are divided by 255 before they are resized instead of after.
        antialias: Whether images are resized with antialiasing.
        processor: The class of transformers' image processor that makes the pixels; None for DETR, whose pixels this
            package makes itself.
        backend: The library with which that processor resizes, `torchvision` or `pil`.
        others: The other settings of that processor that change pixels, if there are any.
    """

    short_side: int | None = 800
    long_side: int | None = 1333
    height: int | None = None
    width: int | None = None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    rescale_first: bool = False
    antialias: bool = True
    processor: str | None = None
    backend: str | None = None
    others: Mapping[str, Any] | None = None

    def input_size(self, size: Size) -> Size:
        """Return the height and width to which an image of this height and width is resized.

        Raises:
            SettingError: The image is so thin that its short side would be less than a pixel.
        """
        if self.height is not None and self.width is not None:
            return self.height, self.width
        assert self.short_side is not None
        rule = resized_size if self.processor is None else hugging_face_size
        return rule(size, self.short_side, math.inf if self.long_side is None else self.long_side)

    def to_json(self) -> dict[str, Any]:
        """Return the settings as the metadata records them, without those that are None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@functools.lru_cache(maxsize=4096)
def resized_size(size: Size, short_side: int = 800, long_side: float = 1333) -> Size:
    """Return the size at which DETR sees an image.

    The rule of official DETR's datasets/transforms.py, including its rounding: the short side becomes `short_side`, or
    less if the long side would exceed `long_side`; the long side is scaled to match and truncated. It may still exceed
    `long_side` by a pixel. Hugging Face and torchvision's `max_size` round differently, with other sizes for some
    images.

    Args:
        size: Height and width of the image.
        short_side: The length to which the short side is resized.
        long_side: The upper limit of the long side.

    Returns:
        Height and width after resizing.

    Raises:
        SettingError: The image is so thin that its short side would be less than a pixel.
    """
    height, width = size
    short, long = min(size), max(size)
    if long / short * short_side > long_side:
        short_side = round(long_side * float(short) / long)
    if short_side < 1:
        raise _too_thin(size)
    if short == short_side:
        return height, width
    other = int(short_side * long / short)
    return (other, short_side) if width < height else (short_side, other)


def hugging_face_size(size: Size, short_side: int, long_side: float) -> Size:
    """Return the size to which transformers' processors resize an image, given a short and a long side.

    Arguments, result and errors are those of `resized_size`; the rounding differs (get_size_with_aspect_ratio in
    transformers/image_transforms.py).
    """
    height, width = size
    short, long = min(size), max(size)
    exact: float | None = None
    if long / short * short_side > long_side:
        exact = long_side * short / long
        short_side = round(exact)
    if short_side < 1:
        raise _too_thin(size)
    if short == short_side:
        return height, width
    other = int((short_side if exact is None else exact) * long / short)
    return (other, short_side) if width < height else (short_side, other)


def _too_thin(size: Size) -> SettingError:
    height, width = size
    return SettingError(f"an image of {width}x{height} (width x height) is too thin: resizing would leave it no pixels")
