"""Weights that a model cannot use, refused by the names of their tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from detr_lightning.errors import InputError, count

COUNTER = "num_batches_tracked"
"""The ends of the names of tensors that only training reads."""


def refuse_misfits(name: str, model: str, wrong: Iterable[str]) -> None:
    """Refuse weights of which something is wrong.

    Args:
        name: The file or folder.
        model: The model that they do not fit, for messages.
        wrong: The problem with each tensor, its name first; counters of training are passed over.

    Raises:
        InputError: There is anything; the message has the first four.
    """
    found = [one for one in wrong if not one.partition(" ")[0].endswith(COUNTER)]
    if found:
        more = f", and {len(found) - 4} more" if len(found) > 4 else ""
        raise InputError(f"{name} does not fit {model}: {'; '.join(found[:4])}{more}.")


def refuse_non_finite(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights that hold NaN or infinity.

    Raises:
        InputError: They do; the message names the first tensor.
    """
    broken = [key for key, tensor in tensors.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    if broken:
        others = f" and {count(len(broken) - 1, 'other tensor')}" if len(broken) > 1 else ""
        raise InputError(
            f"{name} has values that are not finite, in {broken[0]}{others}: "
            "its training diverged, or the file is damaged. Take an earlier checkpoint."
        )
