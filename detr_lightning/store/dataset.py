"""One key of a store as a `torch.utils.data.Dataset`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from detr_lightning.store.stack import pooled
from detr_lightning.store.tensors import Tensors


class EmbeddingDataset(Dataset[tuple[Tensor, Any]]):
    """One key of a store's images, read one by one: items are `(tensor, image id)` or `(tensor, target)`.

    It can be pickled, and is cheap for data workers: it keeps ids and the location of the tensors, not the metadata.
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
