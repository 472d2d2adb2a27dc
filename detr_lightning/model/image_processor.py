"""The image processor that a model was trained with, and its settings as a `Preprocessing`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from detr_lightning.errors import InputError
from detr_lightning.format.keys import Size
from detr_lightning.format.preprocessing import Preprocessing
from detr_lightning.model.transformers_package import import_transformers
from detr_lightning.model.weight_files import first_line

BILINEAR = 2
"""Pillow's number of the usual way to resize."""

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
"""The names of the file with an image processor's settings; in the second, they may be under `image_processor`."""


class Processor:
    """A model's own image processor. It is sent to the data workers.

    Args:
        processor: An image processor of transformers.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: Any, size: Size) -> Tensor:
        """Return the pixels of an RGB Pillow image, resized to a height and width: float32 `[3, height, width]`."""
        height, width = size
        made = self.processor(images=image, size={"height": height, "width": width}, return_tensors="pt")
        pixels: Tensor = made["pixel_values"][0]
        return pixels


def load_processor(folder: Path, model_type: str) -> tuple[Processor, Preprocessing]:
    """Return a folder's image processor, and its preprocessing.

    Raises:
        FileNotFoundError: The folder has no image processor.
        MissingPackageError: transformers is not installed, or too old for the model.
        InputError: The image processor cannot be read, or its settings are not supported.
    """
    transformers = import_transformers(model_type)
    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        raise FileNotFoundError(
            f"{folder} has no preprocessor_config.json, which a {model_type} needs: it defines how images become the "
            "model's input. Save the model's image processor there (save_pretrained), or copy that file from the model "
            "it was fine-tuned from."
        )
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # of several libraries, by version
        raise InputError(f"{folder / 'preprocessor_config.json'}: {first_line(error)}.") from error
    try:
        return Processor(processor), _described(processor)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder / 'preprocessor_config.json'}: {error}") from error


def _described(processor: Any) -> Preprocessing:
    """Return the preprocessing of an image processor.

    Raises:
        ValueError: Its settings are not supported.
    """
    if not processor.do_resize or not processor.do_rescale or abs(processor.rescale_factor - 1 / 255) > 1e-6:
        raise ValueError("do_resize and do_rescale must be true, and rescale_factor must be 1/255.")
    if getattr(processor, "pad_size", None):
        raise ValueError(f"pad_size is {processor.pad_size}, but padding is not supported.")
    name = type(processor).__name__
    first = name.startswith("RfDetr")  # It rescales, then resizes without antialiasing.
    normalised = processor.do_normalize
    return Preprocessing(
        **sides_of(dict(processor.size)),
        mean=tuple(map(float, processor.image_mean)) if normalised else (0.0, 0.0, 0.0),
        std=tuple(map(float, processor.image_std)) if normalised else (1.0, 1.0, 1.0),
        rescale_first=first,
        antialias=not first,
        processor=name,
        backend="pil" if name.endswith("Pil") else "torchvision",
        others=_others(processor) or None,
    )


def _others(processor: Any) -> dict[str, Any]:
    """Return the settings of an image processor that change pixels, besides those that `Preprocessing` has by name."""
    found: dict[str, Any] = {}
    if (resample := getattr(processor, "resample", None)) not in (None, BILINEAR):
        found["resample"] = int(resample)
    if getattr(processor, "do_center_crop", None):
        found["crop_size"] = {name: side for name, side in dict(processor.crop_size).items() if side is not None}
    if divisor := getattr(processor, "size_divisor", None):
        found["size_divisor"] = int(divisor)
    return found


def sides_of(size: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sides in an image processor's `size`, as `Preprocessing` names them.

    Raises:
        InputError: `size` has other keys, or a side below 1.
    """
    given = {name: int(value) for name, value in size.items() if value is not None}
    if given.keys() == {"height", "width"}:
        sides = {"short_side": None, "long_side": None, **given}
    elif "shortest_edge" in given and given.keys() <= {"shortest_edge", "longest_edge"}:
        sides = {"short_side": given["shortest_edge"], "long_side": given.get("longest_edge")}
    else:
        raise InputError(f"size is {given}, but must be height and width, or shortest_edge with longest_edge.")
    if any(side < 1 for side in given.values()):
        raise InputError(f"size is {given}, but its sides must be at least 1.")
    return sides
