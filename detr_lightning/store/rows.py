"""The queries of many images, concatenated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from detr_lightning.errors import SettingError
from detr_lightning.format.keys import AXES, QUERY_INDEX
from detr_lightning.parallel import track
from detr_lightning.store.tensors import Tensors


class Rows(NamedTuple):
    """One row per query."""

    image_ids: Tensor
    """`[N]`: the image of each row."""
    queries: Tensor
    """`[N]`: the query of each row."""
    values: Tensor
    """`[N, ...]`: the tensors, such as `[N, d]` for `query_embeddings` and `[N, L, d]` for `decoder_output`."""


def read_rows(
    tensors: Tensors, key: str, ids: Sequence[int], counts: Sequence[int] | None, progress: bool | None = None
) -> Rows:
    """Return the queries of many images, concatenated.

    Args:
        tensors: The store's tensors.
        key: A key with an axis of queries.
        ids: The image ids.
        counts: How many queries each image kept; None if all were kept.
        progress: Whether to show a progress bar.

    Raises:
        SettingError: The key has no axis of queries, or two shapes differ.
    """
    if "queries" not in AXES.get(key, ()):
        with_queries = ", ".join(name for name, axes in AXES.items() if "queries" in axes)
        raise SettingError(f"{key} has no axis of queries, so it has no rows. The keys with one: {with_queries}.")
    axis = AXES[key].index("queries")
    first = tensors.read(ids[0], key).movedim(axis, 0)
    numbers = torch.tensor([len(first)] * len(ids) if counts is None else counts)
    starts = [0, *numbers.cumsum(0).tolist()]
    values = first.new_empty((starts[-1], *first.shape[1:]))
    queries = torch.arange(len(first)).repeat(len(ids)) if counts is None else torch.empty(starts[-1]).long()

    def fill(index: int, tensor: Tensor) -> None:
        rows, place = tensor.movedim(axis, 0), values[starts[index] : starts[index + 1]]
        if rows.shape != place.shape:
            raise SettingError(
                f"{key} of image {ids[index]} has shape {list(rows.shape)} by queries, but {list(place.shape)} "
                "was expected: different shapes cannot be read as rows. Choose images of one size."
            )
        place.copy_(rows)

    def fill_queries(index: int, tensor: Tensor) -> None:
        queries[starts[index] : starts[index + 1]] = tensor

    for _ in track(tensors.each(ids, key, fill), len(ids), f"Reading {key}", progress):
        pass
    if counts is not None:
        for _ in track(tensors.each(ids, QUERY_INDEX, fill_queries), len(ids), f"Reading {QUERY_INDEX}", progress):
            pass
    return Rows(torch.tensor(ids).repeat_interleave(numbers), queries, values)
