"""Stacking one key of many images into a single tensor, and pooling."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from detr_lightning.errors import SettingError, check_choice
from detr_lightning.format.keys import AXES, SPATIAL
from detr_lightning.parallel import track
from detr_lightning.store.tensors import Tensors

POOLED_AXES: dict[str, tuple[int, ...]] = {
    "backbone_features": (1, 2),  # [C, H, W] -> [C]
    "encoder_output": (0,),  # [H*W, d] -> [d]
    "decoder_output": (1,),  # [L, Q, d] -> [L, d]
    "query_embeddings": (0,),  # [Q, d] -> [d]
    "encoder_layers": (1,),  # [L, H*W, d] -> [L, d]
}
"""The axes that pooling removes: spatial positions or object queries. Layers and features stay."""

POOLS = ("mean", "max")


def check_pool(key: str, pool: str | None) -> None:
    """Check that a key can be pooled in this way; None means no pooling.

    Raises:
        SettingError: It cannot, or the pooling is unknown.
    """
    if pool is not None:
        check_choice("pool", pool, POOLS)
        if key not in POOLED_AXES:
            raise SettingError(f"{key} cannot be pooled; {', '.join(POOLED_AXES)} can.")


def pooled(tensor: Tensor, key: str, pool: str | None) -> Tensor:
    """Return an image's tensor pooled over its spatial positions or queries, in float32; unchanged without `pool`.

    Raises:
        SettingError: The image has no query to pool.
    """
    if pool is None:
        return tensor
    axes = POOLED_AXES[key]
    if not all(tensor.shape[axis] for axis in axes):
        raise SettingError(
            f"an image has no kept queries, so its {key} cannot be pooled. "
            "Choose images that have some: [i for i in store if store.entry(i).num_queries]."
        )
    return tensor.float().mean(axes) if pool == "mean" else tensor.float().amax(axes)


def read_stack(tensors: Tensors, key: str, ids: Sequence[int], pool: str | None, progress: bool | None) -> Tensor:
    """Return one key of these images, `[N, ...]` in their order.

    Raises:
        SettingError: Two shapes differ, or an image has no query to pool.
    """
    first = pooled(tensors.read(ids[0], key), key, pool)
    stacked = first.new_empty((len(ids), *first.shape))

    def fill(row: int, tensor: Tensor) -> None:
        tensor = pooled(tensor, key, pool)
        if tensor.shape != first.shape:
            raise SettingError(
                f"{key} of image {ids[0]} has shape {list(first.shape)} and of image {ids[row]} {list(tensor.shape)}: "
                f"different shapes cannot be stacked.{_advice(key)}"
            )
        stacked[row] = tensor

    for _ in track(tensors.each(ids, key, fill), len(ids), f"Reading {key}", progress):
        pass
    return stacked


def _advice(key: str) -> str:
    ways = ["pool it (pool='mean' or 'max')"] if key in POOLED_AXES else []
    ways += [f"concatenate its queries (store.rows({key!r}))"] if "queries" in AXES[key] else []
    ways += ["choose images of one size"] if key in SPATIAL else []
    text = ", or ".join(ways)
    return f" {text[0].upper()}{text[1:]}." if text else ""
