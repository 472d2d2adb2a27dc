"""One key of a store as a `torch.utils.data.Dataset`, and the pooling that it shares with `EmbeddingStore.stack`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from detr_lightning.errors import SettingError
from detr_lightning.store.tensors import Tensors

POOLED_AXES: dict[str, tuple[int, ...]] = {
    "backbone_features": (1, 2),  # [C, H, W] -> [C]
    "encoder_output": (0,),  # [H*W, d] -> [d]
    "decoder_output": (1,),  # [L, Q, d] -> [L, d]
    "query_embeddings": (0,),  # [Q, d] -> [d]
    "encoder_layers": (1,),  # [L, H*W, d] -> [L, d]
}
"""The axes that pooling removes: places of the image, or object queries. Layers and features stay."""

POOLS = ("mean", "max")


def pooled(tensor: Tensor, key: str, pool: str | None) -> Tensor:
    """Return an image's tensor with its places or queries reduced to one, in float32; unchanged without `pool`."""
    if pool is None:
        return tensor
    axes = POOLED_AXES[key]
    if not all(tensor.shape[axis] for axis in axes):
        raise SettingError(
            f"an image has no kept queries, so its {key} cannot be pooled. "
            "Choose images that have some: [i for i in store if store.entry(i).num_queries]."
        )
    return tensor.float().mean(axes) if pool == "mean" else tensor.float().amax(axes)


class EmbeddingDataset(Dataset[tuple[Tensor, Any]]):
    """One key of a store's images, read one by one: items are `(tensor, image id)` or `(tensor, target)`.

    It pickles and costs data workers little: it holds ids and where the tensors are, not the metadata.
    """

    def __init__(
        self,
        tensors: Tensors,
        image_ids: Sequence[int],
        key: str,
        pool: str | None = None,
        targets: Mapping[int, Any] | None = None,
    ) -> None:
        self.tensors = tensors
        self.image_ids = torch.tensor(image_ids, dtype=torch.int64)
        self.key = key
        self.pool = pool
        self.targets = targets

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        image_id = int(self.image_ids[index])
        tensor = pooled(self.tensors.read(image_id, self.key), self.key, self.pool)
        return tensor, image_id if self.targets is None else self.targets[image_id]
