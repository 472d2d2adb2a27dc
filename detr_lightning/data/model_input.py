"""The input that a model takes, and the settings that change it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

from detr_lightning.data.decode import Processor
from detr_lightning.errors import SettingError
from detr_lightning.format.preprocessing import Preprocessing


class ModelInput(Protocol):
    """A model's knowledge of its input: a `Checkpoint`."""

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing of its training."""

    @property
    def processor(self) -> Processor | None:
        """Makes its input of an image, where this package does not make it itself."""


def with_settings(
    preprocessing: Preprocessing, processor: Processor | None, settings: Mapping[str, Any]
) -> Preprocessing:
    """Return a model's preprocessing with the sides that were set.

    Args:
        preprocessing: Of its training.
        processor: Makes its input, where this package does not.
        settings: `short_side`, `long_side`, `batching` and `image_backend` of `COCODataModule`.

    Raises:
        SettingError: One is set that the model does not leave open, or the long side is less than the short side.
    """
    given = {name: settings[name] for name in ("short_side", "long_side") if settings[name] is not None}
    if given and preprocessing.height is not None:
        raise SettingError(
            f"data.{next(iter(given))} is set, but the model takes images of "
            f"{preprocessing.height}x{preprocessing.width} pixels (height x width) alone. Leave it null."
        )
    if processor is not None and settings["batching"] == "padded":
        raise SettingError("data.batching padded is for DETR alone. Leave it out.")
    if processor is not None and settings["image_backend"] != "pil":
        raise SettingError(
            f"data.image_backend is {settings['image_backend']!r}, but the model's own processor "
            f"({preprocessing.processor}) reads its images. Leave it out."
        )
    used = replace(preprocessing, **given)
    if used.short_side is not None and used.long_side is not None and used.long_side < used.short_side:
        raise SettingError(f"data.long_side ({used.long_side}) is less than data.short_side ({used.short_side}).")
    return used
