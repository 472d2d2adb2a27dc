from __future__ import annotations

import pytest
import torch

from detr_lightning.model.detr import DETR, Architecture
from detr_lightning.model.detr.sizes import check_sizes, read_sizes


@pytest.mark.parametrize(
    "architecture",
    [
        Architecture(),
        Architecture(blocks=(3, 4, 23, 3), num_logits=251),
        Architecture(pre_norm=True, learned_positions=50),
    ],
)
def test_sizes_are_read_off_the_tensors(architecture: Architecture) -> None:
    with torch.device("meta"):
        tensors = DETR(architecture).state_dict()
    assert read_sizes("x", tensors) == architecture
    assert check_sizes(architecture) == architecture
    del tensors["query_embed.weight"]
    with pytest.raises(ValueError, match=r"^x is not a DETR: query_embed.weight is missing\."):
        read_sizes("x", tensors)


def test_what_cannot_be_built() -> None:
    with pytest.raises(ValueError, match=r"model.nheads is 7, which does not divide the model's width of 256"):
        check_sizes(Architecture(nheads=7))
    with pytest.raises(ValueError, match=r"only ResNets with bottleneck blocks.* This is a DETR-R18\."):
        check_sizes(Architecture(block="basic", blocks=(2, 2, 2, 2), dilation=True))
