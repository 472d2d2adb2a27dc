"""A model ready for inference, with everything known about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from detr_lightning.format.keys import Size
from detr_lightning.format.preprocessing import Preprocessing
from detr_lightning.model.detr.detr import DETR
from detr_lightning.model.family import FamilyDetector


@dataclass(frozen=True)
class Checkpoint:
    """A model and its origin.

    Attributes:
        model: The model, ready for inference, in float32 on the CPU.
        name: The official name, the hub id, `random`, or the name of the local file or folder.
        sha256: The sha256 of the file, of several files concatenated, or of the tensors if they are random. If averaged
            weights were requested: the sha256 of the file's sha256 and the word `ema`. For the other detectors: the
            sha256 of the files' sha256 and the config. Empty if the model was planned without its weights.
        notes: Decisions that the tensors do not determine, for the user to read.
        preprocessing: How images become the model's input.
        category_names: The names of the categories by logit index; None if the checkpoint has no names.
        category_ids: The COCO category id of each logit except "no object"; None if the names are not COCO's. Without
            names, the ids are the indices, as in the official code.
        scoring: `softmax`, where the last logit is "no object", or `sigmoid`, where every logit is a category.
        family: The model's type, as transformers names it.
        processor: Makes the model's input from an image; None for DETR, whose input this package makes itself.
    """

    model: DETR | FamilyDetector
    name: str
    sha256: str
    notes: str
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    category_names: dict[int, str] | None = None
    category_ids: tuple[int, ...] | None = None
    scoring: str = "softmax"
    family: str = "detr"
    processor: Callable[[Any, Size], Tensor] | None = None
