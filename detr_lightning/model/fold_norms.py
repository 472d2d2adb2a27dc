"""Frozen norms taken into the convolutions before them, in networks that this package did not build."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

FROZEN_EPS = 1e-5
"""Added to the variance by frozen norms without an `eps` of their own, as in the official DETR."""


def fold_norms(model: nn.Module) -> nn.Module:
    """Take each norm that directly follows a convolution into that convolution's weights, in place.

    Only norms over a batch are taken, whose statistics are fixed at inference; the results stay the same to rounding.

    Args:
        model: In evaluation mode. Where two of a module's children are a convolution and the norm after it, the module
            is taken to apply one after the other: so do all modules of the detectors here.
    """
    for module in list(model.modules()):
        for (name, conv), (norm_name, norm) in pairwise(list(module.named_children())):
            if type(conv) is nn.Conv2d and _is_batch_norm(norm):
                setattr(module, name, _folded(conv, norm))
                setattr(module, norm_name, nn.Identity())
    return model


def _is_batch_norm(norm: nn.Module) -> bool:
    return isinstance(norm, nn.BatchNorm2d) or type(norm).__name__.endswith("FrozenBatchNorm2d")


def _folded(conv: nn.Conv2d, norm: nn.Module) -> nn.Conv2d:
    statistics = {name: getattr(norm, name).double() for name in ("weight", "bias", "running_mean", "running_var")}
    eps = getattr(norm, "eps", FROZEN_EPS)
    # In float64, so that folding itself rounds once.
    scale: Tensor = statistics["weight"] * (statistics["running_var"] + eps).rsqrt()
    bias = torch.zeros_like(scale) if conv.bias is None else conv.bias.double()
    folded = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        conv.groups,
        padding_mode=conv.padding_mode,
        device="meta",
    )
    weight = conv.weight.double() * scale[:, None, None, None]
    shift = statistics["bias"] + (bias - statistics["running_mean"]) * scale
    folded.weight = nn.Parameter(weight.to(conv.weight.dtype), requires_grad=False)
    folded.bias = nn.Parameter(shift.to(conv.weight.dtype), requires_grad=False)
    return folded
