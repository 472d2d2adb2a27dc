"""The backbone optimised for inference: norms folded into the convolutions, ReLU and shortcut fused where possible."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d

from detr_lightning.model.detr import cudnn, onednn
from detr_lightning.model.detr.detr import DETR
from detr_lightning.model.fold_norms import folded_weights


def fold(model: DETR, dtype: torch.dtype | None = None) -> DETR:
    """Return a faster copy of a DETR for inference, whose results are the same up to rounding.

    The copy's backbone has a different `state_dict`: load checkpoints into the model, not into the copy.

    Args:
        model: The model; it is not changed.
        dtype: The dtype of the copy; by default the model's.
    """
    body = cast(nn.Sequential, model.backbone[0].body)
    model.backbone[0].body = nn.Identity()  # not copied, since the copy gets a folded one
    try:
        folded = copy.deepcopy(model)
    finally:
        model.backbone[0].body = body
    folded.backbone[0].body = FoldedResNet(body, dtype or next(model.parameters()).dtype)
    folded.to(dtype)
    return folded.eval().requires_grad_(False)


class FoldedConv(nn.Module):
    """A convolution with a frozen norm folded into its weights."""

    def __init__(self, conv: nn.Conv2d, norm: FrozenBatchNorm2d, dtype: torch.dtype) -> None:
        super().__init__()
        weight, bias = folded_weights(conv, norm)
        self.weight = nn.Parameter(weight.to(dtype).contiguous(memory_format=torch.channels_last))
        self.bias = nn.Parameter(bias.to(dtype))
        self.settings = conv.stride, conv.padding, conv.dilation
        self._packed: tuple[Any, Tensor] | None = None

    def forward(self, x: Tensor, add: Tensor | None = None, relu: bool = True) -> Tensor:
        """Convolve, add a shortcut (which may be overwritten), and apply ReLU."""
        if onednn.usable(x):
            return onednn.convolve(x, self._pack(x), self.bias, self.settings, add, relu)
        if relu and cudnn.usable(x):
            return cudnn.convolve(x, self.weight, self.bias, self.settings, add)
        return onednn.plain_convolve(x, self.weight, self.bias, self.settings, add, relu)

    def _pack(self, x: Tensor) -> Tensor:
        """Return the weight packed for inputs of this shape. Images come sorted by shape, so the last one is kept."""
        version = None if self.weight.is_inference() else self.weight._version
        wanted = x.shape, x.dtype, version
        if self._packed is None or self._packed[0] != wanted:
            self._packed = wanted, onednn.pack(self.weight, self.settings, x.shape)
        return self._packed[1]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the packed weight, which can be neither copied nor pickled."""
        return {**self.__dict__, "_packed": None}


class FoldedBlock(nn.Module):
    """A residual block, basic or bottleneck."""

    def __init__(self, block: BasicBlock | Bottleneck, dtype: torch.dtype) -> None:
        super().__init__()
        names = ("1", "2", "3") if isinstance(block, Bottleneck) else ("1", "2")
        self.convs = nn.ModuleList(
            FoldedConv(getattr(block, f"conv{n}"), getattr(block, f"bn{n}"), dtype) for n in names
        )
        self.shortcut = (
            None if block.downsample is None else FoldedConv(block.downsample[0], block.downsample[1], dtype)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Transform `[B, C, H, W]`; `x` may be overwritten."""
        shortcut = x if self.shortcut is None else self.shortcut(x, relu=False)
        for conv in self.convs[:-1]:
            x = conv(x)
        out: Tensor = self.convs[-1](x, add=shortcut)
        return out


class FoldedResNet(nn.Module):
    """A ResNet body made of folded convolutions."""

    def __init__(self, body: nn.Sequential, dtype: torch.dtype) -> None:
        super().__init__()
        layers = dict(body.named_children())
        self.stem = FoldedConv(cast(nn.Conv2d, layers["conv1"]), cast(FrozenBatchNorm2d, layers["bn1"]), dtype)
        self.maxpool = layers["maxpool"]
        stages = (cast(nn.Sequential, layers[f"layer{number}"]) for number in (1, 2, 3, 4))
        self.blocks = nn.Sequential(
            *(FoldedBlock(cast(Bottleneck, block), dtype) for stage in stages for block in stage)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the features of the last stage, `[B, C, H, W]`, for images `[B, 3, h, w]`."""
        images = images.contiguous(memory_format=torch.channels_last)
        features: Tensor = self.blocks(self.maxpool(self.stem(images)))
        return features
