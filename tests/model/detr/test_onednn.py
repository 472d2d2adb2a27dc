from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from detr_lightning.model.detr import onednn
from detr_lightning.model.detr.folding import FoldedConv
from detr_lightning.model.detr.transformer import Attention

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@DTYPES
@pytest.mark.parametrize("tokens", [(30, 30), (30, 900), (700, 40), (450, 450)], ids=str)
def test_attention_is_that_of_torch(dtype: torch.dtype, tokens: tuple[int, int]) -> None:
    attention = Attention(64, 4).to(dtype).requires_grad_(False)
    reference = nn.MultiheadAttention(64, 4, batch_first=True, dtype=torch.float64)
    reference.load_state_dict({name: tensor.double() for name, tensor in attention.state_dict().items()})
    queries, memory = random(2, tokens[0], 64).to(dtype) * 3, random(2, tokens[1], 64).to(dtype)
    with torch.inference_mode():
        key, value = attention.project(memory, 1, 2).chunk(2, dim=-1)
        got = attention.attend(attention.project(queries, 0, 0), key, value)
        wanted = reference(queries.double(), memory.double(), memory.double(), need_weights=False)[0]
    assert error(got, wanted) < TOLERANCE[dtype]


@DTYPES
def test_packed_weights_follow_shape_precision_and_weights(dtype: torch.dtype) -> None:
    conv = FoldedConv(nn.Conv2d(64, 128, 3, stride=2, padding=1, bias=False), FrozenBatchNorm2d(128), torch.float32)
    conv.requires_grad_(False)

    def check(*size: int) -> None:
        x = random(1, 64, *size).to(conv.weight.dtype).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            wanted = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), stride=2, padding=1).relu()
            assert error(conv(x), wanted) < TOLERANCE[conv.weight.dtype]

    check(20, 30)
    conv.to(dtype)
    for size in ((20, 30), (7, 9), (90, 50), (20, 30)):
        check(*size)
    conv.load_state_dict({"weight": random(128, 64, 3, 3), "bias": random(128)})
    check(20, 30)


def test_a_convolution_that_has_run_can_be_copied() -> None:
    conv = FoldedConv(nn.Conv2d(16, 16, 1, bias=False), FrozenBatchNorm2d(16), torch.float32).requires_grad_(False)
    x = random(1, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        assert torch.equal(copy.deepcopy(conv)(x), conv(x))
        assert torch.equal(copy.deepcopy(conv)(x), conv(x))


def test_training_float64_and_autocast_pass_by() -> None:
    assert not onednn.usable(torch.zeros(1))
    with torch.inference_mode():
        assert not onednn.usable(torch.zeros(1, dtype=torch.float64))
        with torch.autocast("cpu", torch.bfloat16):
            assert not onednn.usable(torch.zeros(1))
