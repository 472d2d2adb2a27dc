"""Communication between the ranks of a run: rank 0 decides, and the others receive the result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from lightning.pytorch import Trainer

T = TypeVar("T")


def from_rank_0(trainer: Trainer, function: Callable[[], T]) -> T:
    """Call a function on rank 0 and return its result on every rank. All ranks must call this.

    If the function raises, rank 0 raises the error and prints the reason; the other ranks exit without a message.
    """
    if trainer.world_size == 1:
        return function()
    result: tuple[T] | None = None
    try:
        if trainer.is_global_zero:
            result = (function(),)
    finally:
        result = trainer.strategy.broadcast(result)
    if result is None:
        raise SystemExit(1)
    return result[0]


def gather(trainer: Trainer, value: Any) -> list[Any]:
    """Return the value of each rank, on every rank. All ranks must call this."""
    values = [value] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def waits_for_launch(trainer: Trainer) -> bool:
    """Return whether this process is about to launch the other ranks of its node itself."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return environment is not None and not environment.creates_processes_externally
