"""Folding of frozen norms into the convolutions before them, in networks that this package did not build."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

FROZEN_EPS = 1e-5
"""The epsilon of frozen norms that have no `eps` attribute, as in the official DETR."""


def fold_norms(model: nn.Module) -> nn.Module:
    """Fold each norm that directly follows a convolution into that convolution's weights, in place.

    Only batch norms are folded, since their statistics are fixed at inference. Results stay the same up to rounding.

    Args:
        model: The model, in evaluation mode. If a convolution and a norm are consecutive children of a module, the
            module is assumed to apply one after the other. All modules of the detectors here do.
    """
    for module in list(model.modules()):
        for (name, conv), (norm_name, norm) in pairwise(list(module.named_children())):
            if type(conv) is nn.Conv2d and _is_batch_norm(norm):
                setattr(module, name, _folded(conv, norm))
                setattr(module, norm_name, nn.Identity())
    return model


def _is_batch_norm(norm: nn.Module) -> bool:
    return isinstance(norm, nn.BatchNorm2d) or type(norm).__name__.endswith("FrozenBatchNorm2d")


def folded_weights(conv: nn.Conv2d, norm: Any) -> tuple[Tensor, Tensor]:
    """Return the weight and the bias of a convolution with a norm folded in, in float64, so as to round only once."""
    scale: Tensor = norm.weight.double() * (norm.running_var.double() + getattr(norm, "eps", FROZEN_EPS)).rsqrt()
    bias = torch.zeros_like(scale) if conv.bias is None else conv.bias.double()
    weight = conv.weight.detach().double() * scale[:, None, None, None]
    return weight, norm.bias.double() + (bias - norm.running_mean.double()) * scale


def _folded(conv: nn.Conv2d, norm: nn.Module) -> nn.Conv2d:
    weight, bias = folded_weights(conv, norm)
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
    folded.weight = nn.Parameter(weight.to(conv.weight.dtype), requires_grad=False)
    folded.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=False)
    return folded
