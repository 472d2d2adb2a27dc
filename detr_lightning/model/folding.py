"""The backbone at inference speed: frozen norms inside the convolutions, ReLU and shortcut fused where oneDNN can."""

from __future__ import annotations

import copy
import functools
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d

from detr_lightning.model.detr import DETR


def fold(model: DETR) -> DETR:
    """Return a copy of a DETR for inference: the same results to rounding, in less time.

    The copy's backbone has another `state_dict`, so checkpoints are loaded before, not into it.
    """
    body = cast(nn.Sequential, model.backbone[0].body)
    model.backbone[0].body = nn.Identity()  # what is replaced is not copied
    try:
        folded = copy.deepcopy(model)
    finally:
        model.backbone[0].body = body
    folded.backbone[0].body = FoldedResNet(body)
    return folded.eval().requires_grad_(False)


class FoldedConv(nn.Module):
    """A convolution that has taken a frozen norm into its weights."""

    def __init__(self, conv: nn.Conv2d, norm: FrozenBatchNorm2d) -> None:
        super().__init__()
        # In float64, so that folding itself rounds once.
        scale = norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()
        weight = conv.weight.detach().double() * scale[:, None, None, None]
        bias = norm.bias.double() - norm.running_mean.double() * scale
        dtype = conv.weight.dtype
        self.weight = nn.Parameter(weight.to(dtype).contiguous(memory_format=torch.channels_last))
        self.bias = nn.Parameter(bias.to(dtype))
        self.stride, self.padding, self.dilation = conv.stride, conv.padding, conv.dilation

    def forward(self, x: Tensor, add: Tensor | None = None, relu: bool = True) -> Tensor:
        """Convolve, add a shortcut (which may be overwritten), and apply ReLU."""
        settings = (self.stride, self.padding, self.dilation)
        if _onednn_may_fuse(x) and onednn_fuses(x.dtype):
            return fused_conv(x, self.weight, self.bias, settings, add, relu)
        return plain_conv(x, self.weight, self.bias, settings, add, relu)


Settings = tuple[Any, Any, Any]
"""A convolution's stride, padding and dilation."""


def plain_conv(x: Tensor, weight: Tensor, bias: Tensor, settings: Settings, add: Tensor | None, relu: bool) -> Tensor:
    """Convolve, add and apply ReLU one after the other."""
    stride, padding, dilation = settings
    x = F.conv2d(x, weight, bias, stride, padding, dilation)
    if add is not None:
        x = x + add
    return x.relu() if relu else x


def fused_conv(x: Tensor, weight: Tensor, bias: Tensor, settings: Settings, add: Tensor | None, relu: bool) -> Tensor:
    """Do what `plain_conv` does in one pass over memory, `add` being overwritten.

    These two operators are what torch's own compiler calls on CPUs. They are not public: `onednn_fuses` says whether
    they are there and do what they should.
    """
    stride, padding, dilation = settings
    how: tuple[Any, ...] = (padding, stride, dilation, 1)
    after = "relu" if relu else "none"
    out: Tensor
    if add is None:
        out = torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *how, after, [], "")
    else:
        sum_and_relu: tuple[Any, ...] = ("add", 1.0, "relu" if relu else None, [], "")
        out = torch.ops.mkldnn._convolution_pointwise_.binary(add, x, weight, bias, *how, *sum_and_relu)
    return out


def _onednn_may_fuse(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()


@functools.cache
def onednn_fuses(dtype: torch.dtype) -> bool:
    """Return whether this torch on this processor has the fused convolutions for a dtype, found out by trying."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight, add = (
        torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
        for shape in ((1, 16, 8, 8), (16, 16, 3, 3), (1, 16, 8, 8))
    )
    bias = torch.zeros(16, dtype=dtype)
    settings = ((1, 1), (1, 1), (1, 1))
    try:
        for shortcut in (None, add):
            wanted = plain_conv(x, weight, bias, settings, shortcut, relu=True)
            got = fused_conv(x, weight, bias, settings, None if shortcut is None else shortcut.clone(), relu=True)
            if not torch.allclose(got, wanted, rtol=0.02, atol=0.1 if dtype == torch.bfloat16 else 1e-3):
                return False
    except (AttributeError, RuntimeError):
        return False
    return True


class FoldedBlock(nn.Module):
    """A residual block, basic or bottleneck."""

    def __init__(self, block: BasicBlock | Bottleneck) -> None:
        super().__init__()
        names = ("1", "2", "3") if isinstance(block, Bottleneck) else ("1", "2")
        self.convs = nn.ModuleList(FoldedConv(getattr(block, f"conv{n}"), getattr(block, f"bn{n}")) for n in names)
        self.shortcut = None if block.downsample is None else FoldedConv(*block.downsample)

    def forward(self, x: Tensor) -> Tensor:
        """Transform `[B, C, H, W]`; `x` may be overwritten."""
        shortcut = x if self.shortcut is None else self.shortcut(x, relu=False)
        for conv in self.convs[:-1]:
            x = conv(x)
        out: Tensor = self.convs[-1](x, add=shortcut)
        return out


class FoldedResNet(nn.Module):
    """A ResNet body made of folded convolutions."""

    def __init__(self, body: nn.Sequential) -> None:
        super().__init__()
        layers = dict(body.named_children())
        self.stem = FoldedConv(cast(nn.Conv2d, layers["conv1"]), cast(FrozenBatchNorm2d, layers["bn1"]))
        self.maxpool = layers["maxpool"]
        stages = (cast(nn.Sequential, layers[f"layer{number}"]) for number in (1, 2, 3, 4))
        self.blocks = nn.Sequential(*(FoldedBlock(cast(Bottleneck, block)) for stage in stages for block in stage))

    def forward(self, images: Tensor) -> Tensor:
        """Return the features of the last stage, `[B, C, H, W]`, for images `[B, 3, h, w]`."""
        images = images.contiguous(memory_format=torch.channels_last)
        if images.device.type != "cpu" or torch.compiler.is_compiling():
            return self._features(images)
        # One by one: a processor's caches hold one image's features, and so memory does not grow with the batch.
        return torch.cat([self._features(image) for image in images.split(1)])

    def _features(self, images: Tensor) -> Tensor:
        features: Tensor = self.blocks(self.maxpool(self.stem(images)))
        return features
