"""What a GPU can do beside the model: copies of the next images to it, and of the last embeddings from it."""

from __future__ import annotations

import functools
from typing import Any

import torch


@functools.cache
def side_stream(_purpose: str, device: torch.device) -> torch.cuda.Stream:
    """Return a stream of a GPU for one purpose."""
    return torch.cuda.Stream(device)


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a batch of images with its tensors on a device. To a GPU they travel while it computes earlier batches."""
    if device.type != "cuda":
        return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    uploads, model = side_stream("uploads", device), torch.cuda.current_stream(device)
    with torch.cuda.stream(uploads):
        moved = {
            key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for key, value in batch.items()
        }
    model.wait_stream(uploads)
    for value in moved.values():
        if isinstance(value, torch.Tensor):
            value.record_stream(model)
    return moved
