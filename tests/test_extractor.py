"""The module itself, without a Trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from detr_lightning import DETRExtractor
from detr_lightning.model.detr import DETR, Architecture

TINY = Architecture("basic", (1, 1, 1, 1), 32, 4, 1, 2, 48, 5, 7)


@pytest.fixture
def weights(tmp_path: Path) -> str:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save({"model": DETR(TINY).state_dict()}, tmp_path / "detr.pth")
    return str(tmp_path / "detr.pth")


def test_the_network_follows_dtype_and_device(weights: str) -> None:
    pixels = torch.randint(256, (1, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        single = DETRExtractor(weights, nheads=4)(pixels)
        double = DETRExtractor(weights, nheads=4).double()(pixels)
    assert {tensor.dtype for tensor in single.values()} == {torch.float32}
    assert {tensor.dtype for tensor in double.values()} == {torch.float64}
    for key, tensor in double.items():
        torch.testing.assert_close(single[key].double(), tensor, rtol=1e-4, atol=1e-5)

    meta = DETRExtractor(weights, nheads=4).to("meta")
    assert meta(pixels.to("meta"), keys=("encoder_output",))["encoder_output"].device.type == "meta"
