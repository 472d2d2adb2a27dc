"""Convolutions and linear layers through oneDNN, for inference on a CPU.

`convolve`, `pack` and `linear` call operators that torch's own compiler emits for CPUs. They are not public: `usable`
reports whether they exist and compute the right numbers. If not, the callers do the same in plain torch.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Settings = tuple[Any, Any, Any]
"""A convolution's stride, padding and dilation."""


def usable(x: Tensor) -> bool:
    """Return whether this module can compute with this tensor in the current mode."""
    if x.device.type != "cpu" or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    return not torch.compiler.is_compiling() and _works(x.dtype)


def plain_convolve(
    x: Tensor, weight: Tensor, bias: Tensor, settings: Settings, add: Tensor | None, relu: bool
) -> Tensor:
    """Convolve, add `add` and apply ReLU, one after the other, in plain torch."""
    stride, padding, dilation = settings
    x = F.conv2d(x, weight, bias, stride, padding, dilation)
    if add is not None:
        x = x + add
    return x.relu() if relu else x


def convolve(x: Tensor, weight: Tensor, bias: Tensor, settings: Settings, add: Tensor | None, relu: bool) -> Tensor:
    """Do what `plain_convolve` does in one pass over memory, and overwrite `add`. `weight` may be packed."""
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


def pack(weight: Tensor, settings: Settings, input_shape: torch.Size) -> Tensor:
    """Return a convolution's weight for `convolve`, in the layout that oneDNN chooses for inputs of a shape.

    A plain weight is rearranged by oneDNN at each call. In the last stage of a ResNet, with many weights and few
    pixels, that takes up to a fifth of the time.
    """
    stride, padding, dilation = settings
    packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
        weight, padding, stride, dilation, 1, list(input_shape)
    )
    return packed


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    """Apply a linear layer to `[..., C]`, optionally followed by a ReLU."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(
        x.contiguous(), weight.contiguous(), bias, "relu" if relu else "none", [], ""
    )
    return out


@functools.cache
def linear_is_faster(dtype: torch.dtype) -> bool:
    """Return whether `linear` is faster than torch's own on this processor.

    torch computes float32 matrix products with MKL. On some processors with AVX-512, MKL uses only AVX2, and takes
    twice as long for the hundreds of tokens here. On processors with AVX2 only, MKL is faster.
    """
    return dtype != torch.float32 or torch.backends.cpu.get_cpu_capability().startswith("AVX512")


@functools.cache
def _works(dtype: torch.dtype) -> bool:
    """Return whether the operators work for a dtype in this torch and on this processor, by trying them."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight, add = (
        torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
        for shape in ((1, 16, 8, 8), (16, 16, 3, 3), (1, 16, 8, 8))
    )
    bias = torch.linspace(-1, 1, 16).to(dtype)
    settings = ((1, 1), (1, 1), (1, 1))
    close = functools.partial(torch.allclose, rtol=0.02, atol=0.1 if dtype == torch.bfloat16 else 1e-3)
    try:
        for kernel in (weight, pack(weight, settings, x.shape)):
            for shortcut in (None, add):
                wanted = plain_convolve(x, weight, bias, settings, shortcut, relu=True)
                got = convolve(x, kernel, bias, settings, None if shortcut is None else shortcut.clone(), relu=True)
                if not close(got, wanted):
                    return False
        rows, matrix = x.flatten(2).squeeze(0).t(), weight[:, :, 0, 0]
        return close(linear(rows, matrix, bias, relu=True), F.linear(rows, matrix, bias).relu())
    except (AttributeError, RuntimeError):
        return False
