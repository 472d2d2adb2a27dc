"""A model ready for inference, and all that is known of it."""

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
    """A model and where it comes from.

    Attributes:
        model: Ready for inference, in float32 on the CPU.
        name: The official name, the hub id, `random`, or the name of the local file or folder.
        sha256: Of the file; of several files, as if they were one; of the tensors if they are random. With averaged
            weights that were chosen over others, of the file's sha256 and the word `ema`. Empty where the weights are
            not there, and the model has only its shapes.
        notes: Decisions that the tensors do not show, for the user to read.
        preprocessing: How images become the model's input.
        category_names: The name of a category by logit index; None where the checkpoint has no names.
        category_ids: The COCO category id of each logit but "no object"; None where the names are not COCO's. Without
            names they are the indices, as in the official code.
        scoring: `softmax`, where the last logit is "no object", or `sigmoid`, where every logit is a category.
        family: The model's type, as transformers names it.
        processor: Makes the model's input of an image; None for DETR, whose input this package makes itself.
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
