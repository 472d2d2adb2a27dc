"""Checks that refuse weights which a model cannot use, and name the tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from detr_lightning.errors import InputError, count

COUNTER = "num_batches_tracked"
"""The ending of the names of tensors that only training reads."""


def refuse_misfits(name: str, model: str, wrong: Iterable[str]) -> None:
    """Refuse weights that do not fit a model.

    Args:
        name: The file or folder, for messages.
        model: The model that they do not fit, for messages.
        wrong: The problem with each tensor, beginning with the tensor's name; training counters are ignored.

    Raises:
        InputError: There are problems; the message lists the first four.
    """
    found = [one for one in wrong if not one.partition(" ")[0].endswith(COUNTER)]
    if found:
        more = f", and {len(found) - 4} more" if len(found) > 4 else ""
        raise InputError(f"{name} does not fit {model}: {'; '.join(found[:4])}{more}.")


def refuse_non_finite(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights that contain NaN or infinity.

    Raises:
        InputError: A tensor contains one; the message names the first such tensor.
    """
    broken = [key for key, tensor in tensors.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    if broken:
        others = f" and {count(len(broken) - 1, 'other tensor')}" if len(broken) > 1 else ""
        raise InputError(
            f"{name} has values that are not finite, in {broken[0]}{others}: "
            "the training diverged, or the file is damaged. Use an earlier checkpoint."
        )
