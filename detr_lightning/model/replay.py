"""Batches of one shape replayed as a CUDA graph, so that the host does not launch each operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Replay:
    """Runs a network for inference on a GPU.

    The host takes about as long to launch the network's hundreds of operators as the GPU takes to compute a small
    batch, and longer while other threads of the process are busy. From the second batch of a shape on, they are
    launched together, as a CUDA graph with bit-identical results. Only the last graph is kept: batches come sorted by
    shape.

    Args:
        network: A network whose operators depend only on the shape of its input, not on its values.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._weights = list(network.parameters())
        self._last: Any = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._pixels = torch.empty(0)
        self._out: dict[str, Tensor] = {}

    def __call__(self, pixels: Tensor, keys: tuple[str, ...]) -> dict[str, Tensor]:
        """Return the network's result for pixels `[B, 3, h, w]` without a padding mask."""
        # A graph reads the weights from their addresses at the time of capture.
        weights = [(weight.data_ptr(), weight.dtype) for weight in self._weights]
        autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        wanted = pixels.shape, pixels.stride(), pixels.dtype, keys, weights, autocast
        if wanted != self._last:
            self._last, self._graph, self._pixels, self._out = wanted, None, torch.empty(0), {}
            out: dict[str, Tensor] = self._network(pixels, None, keys)
            return out
        if self._graph is None:
            self._capture(pixels, keys)
        assert self._graph is not None
        self._pixels.copy_(pixels)
        self._graph.replay()
        return {key: tensor.clone() for key, tensor in self._out.items()}  # the next replay overwrites them

    def _capture(self, pixels: Tensor, keys: tuple[str, ...]) -> None:
        self._pixels = torch.empty_like(pixels)
        graph = torch.cuda.CUDAGraph()
        # Meanwhile, other threads allocate pinned memory and wait for copies.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._out = self._network(self._pixels, None, keys)
        self._graph = graph

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle only the network: graphs can be neither copied nor pickled."""
        return Replay, (self._network,)
