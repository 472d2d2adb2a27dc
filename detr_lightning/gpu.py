"""Copies that overlap with the model's work on a GPU: the next images to it, the last embeddings from it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch


@functools.cache
def side_stream(_purpose: str, device: torch.device) -> torch.cuda.Stream:
    """Return the stream of a GPU for one purpose, created on first use."""
    return torch.cuda.Stream(device)


def move(batch: Mapping[str, Any], device: torch.device, stream: torch.cuda.Stream | None = None) -> dict[str, Any]:
    """Return a batch with its tensors on a device, and everything else unchanged.

    Args:
        batch: Tensors and other values.
        device: The target device.
        stream: The GPU stream that copies, while other streams and the host continue.
    """
    with torch.cuda.stream(stream):  # no effect if None
        # A non-blocking copy to the host goes to pinned memory.
        moved = {
            key: value.detach().to(device, non_blocking=stream is not None)
            if isinstance(value, torch.Tensor)
            else value
            for key, value in batch.items()
        }
    for value in batch.values():
        if stream is not None and isinstance(value, torch.Tensor) and value.is_cuda:
            value.record_stream(stream)  # its memory is not reused before the copy is done
    return moved


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a batch of images with its tensors on a device. A GPU computes earlier batches during the copy."""
    if device.type != "cuda":
        return move(batch, device)
    uploads, model = side_stream("uploads", device), torch.cuda.current_stream(device)
    moved = move(batch, device, uploads)
    model.wait_stream(uploads)
    for value in moved.values():
        if isinstance(value, torch.Tensor):
            value.record_stream(model)
    return moved
