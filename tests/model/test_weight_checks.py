from __future__ import annotations

import pytest
import torch

from detr_lightning.model.weight_checks import refuse_misfits, refuse_non_finite


def test_misfits_are_named_and_counted() -> None:
    refuse_misfits("detr.pth", "a DETR-R50", ["body.bn1.num_batches_tracked is missing"])
    with pytest.raises(ValueError, match=r"^detr.pth does not fit a DETR-R50: a is missing; b is unknown\.$"):
        refuse_misfits("detr.pth", "a DETR-R50", ["a is missing", "x.num_batches_tracked is unknown", "b is unknown"])
    with pytest.raises(ValueError, match=r": 0 is missing; 1 is missing; 2 is missing; 3 is missing, and 2 more\.$"):
        refuse_misfits("detr.pth", "a DETR-R50", [f"{number} is missing" for number in range(6)])


def test_values_that_are_not_finite_are_named_and_counted() -> None:
    good, bad = torch.ones(2), torch.tensor([1, torch.inf])
    refuse_non_finite("detr.pth", {"a": good, "b": torch.tensor([2])})
    with pytest.raises(ValueError, match=r"^detr.pth has values that are not finite, in b: the training diverged"):
        refuse_non_finite("detr.pth", {"a": good, "b": bad})
    with pytest.raises(ValueError, match=r"not finite, in b and 1 other tensor: "):
        refuse_non_finite("detr.pth", {"a": good, "b": bad, "c": bad * torch.nan})
