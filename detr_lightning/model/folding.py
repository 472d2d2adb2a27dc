"""The backbone at inference speed: frozen norms inside the convolutions, ReLU and shortcut fused where oneDNN can."""

from __future__ import annotations

import copy

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
    body = model.backbone[0].body
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
        settings = (self.padding, self.stride, self.dilation)
        if _onednn_fuses(x):
            if add is None:
                attribute = "relu" if relu else "none"
                return torch.ops.mkldnn._convolution_pointwise(
                    x, self.weight, self.bias, *settings, 1, attribute, [], ""
                )
            return torch.ops.mkldnn._convolution_pointwise_.binary(
                add, x, self.weight, self.bias, *settings, 1, "add", 1.0, "relu", [], ""
            )
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation)
        if add is not None:
            x = x + add
        return x.relu() if relu else x


def _onednn_fuses(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


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
        self.stem = FoldedConv(body.conv1, body.bn1)
        self.maxpool = body.maxpool
        stages = (body.layer1, body.layer2, body.layer3, body.layer4)
        self.blocks = nn.Sequential(*(FoldedBlock(block) for stage in stages for block in stage))

    def forward(self, images: Tensor) -> Tensor:
        """Return the features of the last stage, `[B, C, H, W]`, for images `[B, 3, h, w]`."""
        images = images.contiguous(memory_format=torch.channels_last)
        features: Tensor = self.blocks(self.maxpool(self.stem(images)))
        return features
