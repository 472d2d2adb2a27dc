"""Copies that run beside the model on a GPU: of the next images to it, and of the last embeddings from it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch


@functools.cache
def side_stream(_purpose: str, device: torch.device) -> torch.cuda.Stream:
    """Return a stream of a GPU for one purpose."""
    return torch.cuda.Stream(device)


def move(batch: Mapping[str, Any], device: torch.device, stream: torch.cuda.Stream | None = None) -> dict[str, Any]:
    """Return a batch with its tensors on a device, all else as it is.

    Args:
        batch: Tensors among other values.
        device: Where to.
        stream: A GPU's stream that does it, while its other streams and the host go on.
    """
    with torch.cuda.stream(stream):  # None changes nothing
        # To the host torch copies into pinned memory when asked not to block.
        moved = {
            key: value.detach().to(device, non_blocking=stream is not None)
            if isinstance(value, torch.Tensor)
            else value
            for key, value in batch.items()
        }
    for value in batch.values():
        if stream is not None and isinstance(value, torch.Tensor) and value.is_cuda:
            value.record_stream(stream)  # its memory is not given to others before it was read
    return moved


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a batch of images with its tensors on a device. To a GPU they travel while it computes earlier batches."""
    if device.type != "cuda":
        return move(batch, device)
    uploads, model = side_stream("uploads", device), torch.cuda.current_stream(device)
    moved = move(batch, device, uploads)
    model.wait_stream(uploads)
    for value in moved.values():
        if isinstance(value, torch.Tensor):
            value.record_stream(model)
    return moved
