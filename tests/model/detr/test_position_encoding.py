from __future__ import annotations

import pytest
import torch

from detr_lightning.model.detr import DETR, Architecture
from detr_lightning.model.detr.position_encoding import SinePositionEncoding


@pytest.mark.parametrize("size", [(1, 1), (25, 34), (42, 25), (84, 50)])
def test_without_padding_it_is_as_with_an_empty_mask(size: tuple[int, int]) -> None:
    encoding, features = SinePositionEncoding(256), torch.zeros(1, 1, *size)
    assert torch.equal(encoding(features), encoding(features, torch.zeros(1, *size, dtype=torch.bool)))


def test_nothing_is_kept_from_image_to_image() -> None:
    encoding = SinePositionEncoding(256)
    before = dict(encoding.__dict__)
    for height in range(40, 60):
        encoding(torch.zeros(1, 1, height, 84))
    assert encoding.__dict__ == before


def test_what_inference_mode_made_can_take_part_in_training() -> None:
    encoding = SinePositionEncoding(32)
    with torch.inference_mode():
        encoding(torch.zeros(1, 1, 2, 3))
    weight = torch.ones(32, requires_grad=True)
    (encoding(torch.zeros(1, 1, 2, 3)) * weight).sum().backward()
    assert weight.grad is not None


def test_learned_positions_have_an_end() -> None:
    architecture = Architecture(learned_positions=50)
    assert architecture.feature_size((800, 1600)) == (25, 50)
    with pytest.raises(ValueError, match=r"for 50 rows and columns of features.*Set data.long_side to 1600 or less"):
        architecture.feature_size((800, 1601))
    with torch.device("meta"):
        assert DETR(architecture).state_dict()["backbone.1.row_embed.weight"].shape == (50, 128)
