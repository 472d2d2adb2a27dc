"""Checks of the image settings: the allowed values, and those that a model allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

from detr_lightning.data.batching import BATCHINGS
from detr_lightning.data.decode import BACKENDS, EXIF, Processor
from detr_lightning.errors import SettingError, check_choice
from detr_lightning.format.preprocessing import Preprocessing

_CHOICES = {
    "batching": BATCHINGS,
    "image_backend": BACKENDS,
    "exif": EXIF,
    "on_error": ("raise", "skip"),
    "fingerprint": ("names", "content"),
}
_LOWEST = {"batch_size": 1, "num_workers": 0, "limit": 1, "short_side": 1, "long_side": 1, "max_image_pixels": 1}


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse settings of `COCODataModule` that no model allows.

    Raises:
        SettingError: A setting is not allowed, or contradicts another one.
    """
    for name, allowed in _CHOICES.items():
        check_choice(f"data.{name}", settings[name], allowed)
    for name, least in _LOWEST.items():
        value = settings[name]
        if value is not None and value < least:
            raise SettingError(f"data.{name} is {value}, but must be at least {least}.")
    if settings["batching"] == "padded" and settings["batch_size"] is None:
        raise SettingError("data.batching padded needs data.batch_size: its results depend on it.")


class ModelInput(Protocol):
    """The part of a `Checkpoint` that describes the model's input."""

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing that the model was trained with."""

    @property
    def processor(self) -> Processor | None:
        """Makes the model's input from an image; None if this package does."""


def with_settings(
    preprocessing: Preprocessing, processor: Processor | None, settings: Mapping[str, Any]
) -> Preprocessing:
    """Return a model's preprocessing with the sides that the user set.

    Args:
        preprocessing: The preprocessing that the model was trained with.
        processor: Makes the model's input; None if this package does.
        settings: `short_side`, `long_side`, `batching` and `image_backend` of `COCODataModule`.

    Raises:
        SettingError: The model does not allow a setting, or the long side is less than the short side.
    """
    given = {name: settings[name] for name in ("short_side", "long_side") if settings[name] is not None}
    if given and preprocessing.height is not None:
        raise SettingError(
            f"data.{next(iter(given))} is set, but the model only takes images of "
            f"{preprocessing.height}x{preprocessing.width} pixels (height x width). Leave it null."
        )
    if processor is not None and settings["batching"] == "padded":
        raise SettingError("data.batching padded works only with DETR. Leave it out.")
    if processor is not None and settings["image_backend"] != "pil":
        raise SettingError(
            f"data.image_backend is {settings['image_backend']!r}, but the model's own processor "
            f"({preprocessing.processor}) reads its images. Leave it out."
        )
    used = replace(preprocessing, **given)
    if used.short_side is not None and used.long_side is not None and used.long_side < used.short_side:
        raise SettingError(f"data.long_side ({used.long_side}) is less than data.short_side ({used.short_side}).")
    return used
