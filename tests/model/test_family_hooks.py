"""Hooks on transformers' networks: what they keep, and that none is left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_reference import SQUARE, build

from detr_lightning.model.family_hooks import watching


def hooks_of(model: Any) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_every_decoder_layer_is_seen_and_no_hook_stays() -> None:
    model = build("rt_detr")
    before = hooks_of(model)
    with torch.inference_mode(), watching(model.model, encoder=False) as seen:
        out = model(torch.rand(1, 3, *SQUARE))
        assert hooks_of(model) > before
    assert hooks_of(model) == before
    assert torch.equal(torch.stack(seen.decoder, dim=1), out.intermediate_hidden_states)
    assert [tuple(state.shape[:2]) for state in seen.memory] == [(1, sum(h * w for h, w in seen.levels))]
    assert (len(seen.backbone), len(seen.encoder)) == (1, 0)


def test_encoder_layers_are_seen_on_request() -> None:
    model = build("conditional_detr")
    with torch.inference_mode(), watching(model.model, encoder=True) as seen:
        out = model(torch.rand(1, 3, 96, 128))
    assert len(seen.encoder) == len(model.model.encoder.layers)
    for state in (seen.encoder[-1], *seen.memory):
        assert torch.equal(state, out.encoder_last_hidden_state)


def test_a_forward_pass_that_fails_leaves_no_hook() -> None:
    model = build("conditional_detr")
    before = hooks_of(model)
    with pytest.raises(RuntimeError, match="stop"), watching(model.model, encoder=True):  # noqa: PT012
        assert hooks_of(model) > before
        raise RuntimeError("stop")
    assert hooks_of(model) == before
