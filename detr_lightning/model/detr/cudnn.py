"""Convolutions through cuDNN, for inference on a GPU: bias, shortcut and ReLU in the same pass over memory.

`convolve` calls operators that torch's TorchScript emits for GPUs. They are not public: `usable` reports whether they
exist and compute the right numbers. If not, the caller does the same in plain torch.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from detr_lightning.model.detr.onednn import Settings, plain_convolve


def usable(x: Tensor) -> bool:
    """Return whether this module can compute with this tensor in the current mode."""
    if not x.is_cuda or torch.is_grad_enabled() or torch.is_autocast_enabled("cuda"):
        return False
    return not torch.compiler.is_compiling() and _works(x.dtype, x.device)


def convolve(x: Tensor, weight: Tensor, bias: Tensor, settings: Settings, add: Tensor | None) -> Tensor:
    """Do what `plain_convolve` does with ReLU, in one pass over memory."""
    stride, padding, dilation = settings
    out: Tensor
    if add is None:
        out = torch.cudnn_convolution_relu(x, weight, bias, stride, padding, dilation, 1)
    else:
        out = torch.cudnn_convolution_add_relu(x, weight, add, 1.0, bias, stride, padding, dilation, 1)
    return out


@functools.cache
def _works(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether the operators work for a dtype in this torch and on this GPU, by trying them."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16) or not torch.backends.cudnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight, add = (
        torch.randn(shape, generator=generator).to(device, dtype).contiguous(memory_format=torch.channels_last)
        for shape in ((1, 16, 8, 8), (16, 16, 3, 3), (1, 16, 8, 8))
    )
    bias = torch.linspace(-1, 1, 16).to(device, dtype)
    settings = ((1, 1), (1, 1), (1, 1))
    try:
        for shortcut in (None, add):
            wanted = plain_convolve(x, weight, bias, settings, shortcut, relu=True)
            got = convolve(x, weight, bias, settings, shortcut)
            if not torch.allclose(got, wanted, rtol=0.02, atol=0.1):
                return False
    except (AttributeError, RuntimeError):
        return False
    return True
