"""Names of Hugging Face's DETR, as its own model has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from detr_lightning.model import checkpoints
from detr_lightning.model.detr.hugging_face_names import to_official


@pytest.mark.parametrize("name", ["small-no-timm", "learned", "r18"])
def test_every_tensor_of_detr_has_one(reference: Any, name: str) -> None:
    official = to_official(reference(name).model.state_dict())
    wanted = checkpoints.load(str(reference(name).folder)).model.state_dict()
    assert official.keys() - wanted.keys() <= {key for key in official if key.endswith("num_batches_tracked")}
    assert wanted.keys() <= official.keys()
    for key, tensor in wanted.items():
        assert torch.equal(official[key], tensor), key


def test_projections_are_stacked_or_stay_missing() -> None:
    names = {part: f"model.decoder.layers.0.self_attn.{part}_proj.weight" for part in "kqv"}
    tensors = {names[part]: torch.full((2, 2), float(number)) for number, part in enumerate("kqv")}
    stacked = to_official(tensors)["transformer.decoder.layers.0.self_attn.in_proj_weight"]
    assert stacked[:, 0].tolist() == [1, 1, 0, 0, 2, 2]
    assert to_official({names[part]: tensors[names[part]] for part in "kv"}) == {}
