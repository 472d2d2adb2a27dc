"""`EmbeddingStore`: the output folder of an extraction, read as a mapping from image ids to tensors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from detr_lightning.errors import InputError, SettingError, check_choice
from detr_lightning.format.keys import QUERY_INDEX
from detr_lightning.format.metadata import MetadataFile, read_metadata
from detr_lightning.format.names import METADATA, TABLE, is_url
from detr_lightning.store.dataset import EmbeddingDataset
from detr_lightning.store.images import StoredImages
from detr_lightning.store.partial import read_partial
from detr_lightning.store.rows import Rows, read_rows
from detr_lightning.store.stack import check_pool, read_stack
from detr_lightning.store.tensors import FileTensors, Tensors


class EmbeddingStore(StoredImages):
    """The output folder of an extraction, as a mapping from image ids, ascending, to tensors by key.

    Args:
        folder: The `output_dir` of the extraction: a folder, or the URL of a table such as `s3://bucket/embeddings`.
        partial: Also read an unfinished extraction: the images finished so far. The store does not see those that
            finish later.

    Raises:
        FileNotFoundError: There is no such folder, or its extraction has not finished and `partial` is False.
        InputError: Its `metadata.json` is damaged or another program's.
        MissingPackageError: It is a table, and Lance is not installed.
        OSError: The object store does not answer, or refuses.

    Example:
        >>> store = EmbeddingStore("embeddings_output")
        >>> store[139]["query_embeddings"].shape
        torch.Size([100, 256])
        >>> ids, vectors = store.stack("query_embeddings", pool="mean")
    """

    def __init__(self, folder: str | os.PathLike[str], partial: bool = False) -> None:
        self.folder = None if is_url(folder) else Path(folder).expanduser().absolute()
        self.name = os.fspath(folder) if self.folder is None else str(self.folder)
        self._tensors: Tensors
        if self.folder is not None and not (self.folder / TABLE).is_dir():
            read = read_partial if partial else read_metadata
            self.metadata_file, self._tensors = read(self.folder), FileTensors(self.folder)
        else:
            from detr_lightning.store.table import open_table  # needs Lance

            self.metadata_file, self._tensors = open_table(self.name, partial)

    @classmethod
    def of(cls, name: str, metadata: MetadataFile, tensors: Tensors) -> EmbeddingStore:
        """Return a store that is not a folder.

        Args:
            name: The store's name in messages.
            metadata: The store's metadata.
            tensors: The store's tensors.
        """
        store = cls.__new__(cls)
        store.folder, store.name, store.metadata_file, store._tensors = None, name, metadata, tensors
        return store

    @property
    def bytes_on_disk(self) -> int:
        """The bytes of all tensors as stored, file headers included."""
        return self._tensors.bytes_on_disk

    def __getitem__(self, image_id: SupportsIndex) -> dict[str, Tensor]:
        """Return all tensors of an image, by key.

        Raises:
            UnknownImageError: The store has no such image; the message names the nearest ids.
        """
        return self._tensors.load(self._known(image_id))

    def path(self, image_id: SupportsIndex) -> Path:
        """Return the path of an image's file.

        Raises:
            UnknownImageError: The store has no such image.
            SettingError: The store does not have one file per image.
        """
        if not isinstance(self._tensors, FileTensors):
            raise SettingError(
                f"{self.name} does not have one file per image. Read a tensor with load, or all with store[id]."
            )
        return self._tensors.path(self._known(image_id))

    def load(self, image_id: SupportsIndex, key: str) -> Tensor:
        """Return one tensor of an image, without reading the rest of its file.

        Raises:
            UnknownImageError: The store has no such image.
            SettingError: The store has no such key.
        """
        self.require(key)
        return self._tensors.read(self._known(image_id), key)

    def stack(
        self,
        key: str,
        image_ids: Iterable[int] | None = None,
        pool: str | None = None,
        progress: bool | None = None,
    ) -> tuple[list[int], Tensor]:
        """Return one key of many images as a single tensor. Only that key's bytes are read.

        Args:
            key: One of `embedding_keys`.
            image_ids: Which images, in which order; by default all.
            pool: `mean` or `max` over the spatial positions or the object queries, in float32; layers stay.
                `backbone_features` `[C, H, W]` become `[C]`, `encoder_output` `[H*W, d]` and `query_embeddings`
                `[Q, d]` become `[d]`, `decoder_output` `[L, Q, d]` and `encoder_layers` `[L, H*W, d]` become `[L, d]`.
            progress: Show a progress bar; by default for more than 1000 images or after two seconds.

        Returns:
            The image ids, and a tensor `[N, ...]` whose rows are in their order.

        Raises:
            UnknownImageError: The store has no such image.
            SettingError: The store has no such key, it cannot be pooled, no image was chosen, or two shapes differ.
        """
        ids = self._chosen(key, image_ids, pool)
        return ids, read_stack(self._tensors, key, ids, pool, progress)

    def rows(self, key: str, image_ids: Iterable[int] | None = None, progress: bool | None = None) -> Rows:
        """Return the queries of many images, concatenated, however many each image kept.

        Args:
            key: A key with an axis of queries, such as `query_embeddings`.
            image_ids: Which images, in which order; by default all.
            progress: Show a progress bar; by default for more than 1000 images or after two seconds.

        Returns:
            `image_ids` `[N]`, `queries` `[N]` and `values` `[N, ...]`; `decoder_output` gives `[N, L, d]`.

        Raises:
            UnknownImageError: The store has no such image.
            SettingError: The store has no such key, it has no queries, no image was chosen, or two shapes differ.
        """
        ids = self._chosen(key, image_ids, None)
        counts = None if self.min_score is None else [self.entry(image_id).num_queries or 0 for image_id in ids]
        return read_rows(self._tensors, key, ids, counts, progress)

    def queries(self, image_id: SupportsIndex, count: int) -> Tensor:
        """Return the indices of the queries in an image's tensors, `[count]`; without `min_score` these are all."""
        return torch.arange(count) if self.min_score is None else self.load(image_id, QUERY_INDEX)

    def positions(self, image_id: SupportsIndex, queries: Tensor) -> Tensor:
        """Return the positions of these queries in an image's tensors.

        Raises:
            SettingError: One of them was not kept.
        """
        if self.min_score is None:
            return queries
        kept = self.load(image_id, QUERY_INDEX)
        places = torch.searchsorted(kept, queries).clamp(max=max(len(kept) - 1, 0))
        missing = queries if not len(kept) else queries[kept[places] != queries]
        if len(missing):
            raise SettingError(f"{self.name} does not keep query {int(missing[0])} of image {image_id}.")
        return places

    def dataset(
        self,
        key: str = "query_embeddings",
        image_ids: Iterable[int] | None = None,
        pool: str | None = None,
        targets: Mapping[int, Any] | None = None,
    ) -> EmbeddingDataset:
        """Return a view for a `DataLoader`, for example to train a probe. Each item is read when it is requested.

        The workers of a table's `DataLoader` need `multiprocessing_context="spawn"`.

        Args:
            key: One of `embedding_keys`.
            image_ids: Which images, in which order; by default all, or those that have a target.
            pool: As for `stack`.
            targets: The target of each tensor, by image id; by default the image id itself.

        Raises:
            UnknownImageError: The store has no such image.
            SettingError: The store has no such key, it cannot be pooled, or no image was chosen.
        """
        if image_ids is None and targets is not None:
            image_ids = [image_id for image_id in self if image_id in targets]
        return EmbeddingDataset(self._tensors, self._chosen(key, image_ids, pool), key, pool, targets)

    def feature_map(self, image_id: SupportsIndex, key: str = "encoder_output", level: int = 0) -> Tensor:
        """Return a tensor with its spatial positions folded back into a feature map.

        Args:
            image_id: One of `image_ids`.
            key: `encoder_output` becomes `[d, H, W]`, `encoder_layers` `[L, d, H, W]`, `cross_attention`
                `[L, Q, H, W]`; `backbone_features` are a map already, of the backbone's last level.
            level: Which feature map, if the model has several: 0 is the first, in most models the finest.

        Raises:
            UnknownImageError: The store has no such image.
            SettingError: The store has no such key, the key has no spatial positions, or there is no such level.
            InputError: The metadata lacks the size of the feature map.
        """
        check_choice("key", key, ("encoder_output", "encoder_layers", "cross_attention", "backbone_features"))
        tensor = self.load(image_id, key)
        if key == "backbone_features":
            return tensor
        features = self.entry(image_id).features
        if features is None:
            raise InputError(f"{self.name}/{METADATA} has no feature_size for image {image_id}.")
        if not 0 <= level < len(features.levels):
            raise SettingError(f"level is {level}; image {image_id} has levels 0 to {len(features.levels) - 1}.")
        return features.fold(tensor if key == "cross_attention" else tensor.transpose(-1, -2), level)

    def _chosen(self, key: str, image_ids: Iterable[int] | None, pool: str | None) -> list[int]:
        """Check the arguments of `stack`, `rows` and `dataset`, and return the ids."""
        self.require(key)
        check_pool(key, pool)
        ids = self.image_ids if image_ids is None else list(map(self._known, image_ids))
        if not ids:
            raise SettingError(f"No image of {self.name} was chosen. It has {len(self)} images.")
        return ids
