"""`EmbeddingStore`: the output folder of an extraction, read as a mapping from image ids to tensors."""

from __future__ import annotations

import bisect
import difflib
import operator
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from detr_lightning.errors import InputError, SettingError, UnknownImageError, check_choice, count
from detr_lightning.format.entries import ImageEntry
from detr_lightning.format.keys import AXES, QUERY_INDEX, SPATIAL, Size
from detr_lightning.format.metadata import MetadataFile, read_metadata
from detr_lightning.format.names import METADATA, TABLE, is_url
from detr_lightning.format.schema import LANCE
from detr_lightning.parallel import track
from detr_lightning.store.dataset import POOLED_AXES, POOLS, EmbeddingDataset, pooled
from detr_lightning.store.partial import read_partial
from detr_lightning.store.rows import Rows, read_rows
from detr_lightning.store.tensors import FileTensors, Tensors


class EmbeddingStore(Mapping[int, dict[str, Tensor]]):
    """The output folder of an extraction, as a mapping from image ids, ascending, to tensors by key.

    Args:
        folder: The `output_dir` of the extraction: a folder, or the URL of a table such as `s3://bucket/embeddings`.
        partial: Read an extraction that has not finished too: the images that are finished now. The store does not
            see those that follow.

    Raises:
        FileNotFoundError: There is no such folder, or its extraction has not finished, and `partial` is false.
        ValueError: The folder's metadata.json is not one of this program's.

    Example:
        >>> store = EmbeddingStore("embeddings_output")
        >>> store[139]["query_embeddings"].shape
        torch.Size([100, 256])
        >>> ids, vectors = store.stack("query_embeddings", pool="mean")
    """

    def __init__(self, folder: str | os.PathLike[str], partial: bool = False) -> None:
        self.folder: Path | None = None if is_url(folder) else Path(folder).expanduser().absolute()
        self.name = os.fspath(folder) if self.folder is None else str(self.folder)
        self.metadata_file: MetadataFile
        self._tensors: Tensors
        if self.folder is not None and not (self.folder / TABLE).is_dir():
            read = read_partial if partial else read_metadata
            self.metadata_file, self._tensors = read(self.folder), FileTensors(self.folder)
        else:
            from detr_lightning.store.table import open_table  # which needs Lance

            self.metadata_file, self._tensors = open_table(self.name, partial)

    @classmethod
    def of(cls, name: str, metadata: MetadataFile, tensors: Tensors) -> EmbeddingStore:
        """Return a store that is no folder.

        Args:
            name: The name that messages use.
            metadata: Its metadata.
            tensors: Its tensors.
        """
        store = cls.__new__(cls)
        store.folder, store.name, store.metadata_file, store._tensors = None, name, metadata, tensors
        return store

    @property
    def is_table(self) -> bool:
        """Whether the store is a Lance table, rather than one file per image or memory."""
        return self.metadata_file.layout == LANCE

    @property
    def is_partial(self) -> bool:
        """Whether the extraction is unfinished."""
        return self.metadata_file.partial

    @property
    def num_planned(self) -> int | None:
        """How many images the store has when its extraction has finished; None where that is not recorded."""
        return self.metadata_file.num_planned if self.is_partial else len(self)

    @property
    def progress(self) -> str:
        """The number of images, and how far an unfinished extraction is: `8 images` or `3 of 8 images, unfinished`."""
        if not self.is_partial:
            return count(len(self), "image")
        planned = "an unknown number of" if self.num_planned is None else str(self.num_planned)
        return f"{len(self)} of {planned} images, unfinished"

    @property
    def bytes_on_disk(self) -> int:
        """The bytes of all tensors as stored, with what surrounds them."""
        return self._tensors.bytes_on_disk

    @property
    def location(self) -> str:
        """Where the store is: an absolute path, or the name of a store that is no folder."""
        return self.name if self.folder is None else str(self.folder.resolve())

    @property
    def metadata(self) -> dict[str, Any]:
        """All that `metadata.json` holds."""
        return self.metadata_file.content

    @property
    def image_ids(self) -> list[int]:
        """The ids of all images, ascending."""
        return list(self.metadata_file.image_ids)

    @property
    def embedding_keys(self) -> tuple[str, ...]:
        """The keys that each image's file holds, in the file's order."""
        return self.metadata_file.embedding_keys

    @property
    def categories(self) -> dict[int, str]:
        """The names of the categories by logit index, which is the COCO category id; empty if they are unknown."""
        return self.metadata_file.categories

    @property
    def min_score(self) -> float | None:
        """The score that a query needed to be kept (`writer.min_score`), or None where all queries were kept."""
        return self.metadata_file.min_score

    def __len__(self) -> int:
        return len(self.metadata_file.image_ids)

    def __iter__(self) -> Iterator[int]:
        return iter(self.metadata_file.image_ids)

    def __contains__(self, image_id: object) -> bool:
        return isinstance(image_id, SupportsIndex) and operator.index(image_id) in self.metadata_file

    def __getitem__(self, image_id: SupportsIndex) -> dict[str, Tensor]:
        """Return an image's tensors, read whole.

        Raises:
            KeyError: The store holds no such image; the nearest ids are named.
        """
        return self._tensors.load(self._known(image_id))

    def __eq__(self, other: object) -> bool:
        return self is other  # Tensors do not compare to one truth.

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"EmbeddingStore({self.name!r}: {self.progress}, {', '.join(self.embedding_keys)})"

    def entry(self, image_id: SupportsIndex) -> ImageEntry:
        """Return the record of an image: `file_name`, `width`, `height`, `input_size`, `features`, ...

        Raises:
            KeyError: The store holds no such image; the nearest ids are named.
            InputError: Its record is incomplete.
        """
        return self.metadata_file.entry(self._known(image_id))

    def _known(self, image_id: SupportsIndex) -> int:
        """Return an image's id as an integer.

        Raises:
            UnknownImageError: The store holds no such image.
        """
        try:
            number = operator.index(image_id)
        except TypeError:
            raise UnknownImageError(
                f"{image_id!r} is no image id of {self.name}: ids are integers. "
                "metadata['images'] lists each with its file_name."
            ) from None
        if number in self.metadata_file:
            return number
        ids = self.metadata_file.image_ids
        message = f"image {number} is not among the {len(ids)} images of {self.name}."
        if ids:
            place = bisect.bisect(ids, number)
            near = sorted(ids[max(0, place - 3) : place + 3], key=lambda other: abs(other - number))[:3]
            message += f" The nearest ids: {', '.join(map(str, near))}."
        raise UnknownImageError(message)

    def path(self, image_id: SupportsIndex) -> Path:
        """Return the path of an image's file.

        Raises:
            KeyError: The store holds no such image.
            SettingError: The store has no file per image.
        """
        if not isinstance(self._tensors, FileTensors):
            raise SettingError(f"{self.name} has no file per image. Read a tensor with load, or all with store[id].")
        return self._tensors.path(self._known(image_id))

    def image_path(self, image_id: SupportsIndex, image_dir: str | os.PathLike[str] | None = None) -> Path:
        """Return the path of the image itself.

        Args:
            image_id: One of `image_ids`.
            image_dir: Where the images are now; by default where they were when they were extracted.

        Raises:
            FileNotFoundError: The image is not there.
        """
        file_name = self.entry(image_id).file_name
        if image_dir is None:
            image_dir = self.metadata_file.image_dir
        if image_dir is None:
            raise FileNotFoundError(f"{self.name} does not say where {file_name} is. Give image_dir.")
        path = Path(image_dir).expanduser() / file_name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there. Give image_dir, the folder in which the images are now.")
        return path

    def load(self, image_id: SupportsIndex, key: str) -> Tensor:
        """Return one tensor of an image, without reading the rest of its file.

        Raises:
            KeyError: The store holds no such image.
            ValueError: The files hold no such key.
        """
        self.require(key)
        return self._tensors.read(self._known(image_id), key)

    def require(self, *keys: str) -> None:
        """Check that the files hold these keys.

        Raises:
            ValueError: A key is missing; those that the files hold are named.
        """
        for key in keys:
            if key not in self.embedding_keys:
                near = difflib.get_close_matches(key, self.embedding_keys, n=1)
                hint = f"Did you mean {near[0]!r}? " if near else ""
                raise SettingError(
                    f"{self.name} holds no {key!r}, only {', '.join(self.embedding_keys)}. {hint}"
                    f"Name {key} in model.keys, or choose an extract_type that has it, and extract into another folder."
                )

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
            pool: `mean` or `max` over the places of the image or the object queries, in float32; layers stay.
                `backbone_features` `[C, H, W]` become `[C]`, `encoder_output` `[H*W, d]` and `query_embeddings`
                `[Q, d]` become `[d]`, `decoder_output` `[L, Q, d]` and `encoder_layers` `[L, H*W, d]` `[L, d]`.
            progress: Show a progress bar; by default for more than 1000 images or after two seconds.

        Returns:
            The image ids, and a tensor `[N, ...]` whose rows are in their order.

        Raises:
            KeyError: The store holds no such image.
            ValueError: The files hold no such key, it cannot be pooled, no image was chosen, or two shapes differ.
        """
        ids = self._chosen(key, image_ids, pool)
        first = pooled(self.load(ids[0], key), key, pool)
        stacked = first.new_empty((len(ids), *first.shape))

        def fill(row: int, tensor: Tensor) -> None:
            tensor = pooled(tensor, key, pool)
            if tensor.shape != first.shape:
                raise SettingError(
                    f"{key} of image {ids[0]} is {list(first.shape)} and of image {ids[row]} {list(tensor.shape)}: "
                    f"different shapes cannot be stacked.{_advice(key)}"
                )
            stacked[row] = tensor

        for _ in track(self._tensors.each(ids, key, fill), len(ids), f"Reading {key}", progress):
            pass
        return ids, stacked

    def rows(self, key: str, image_ids: Iterable[int] | None = None, progress: bool | None = None) -> Rows:
        """Return the queries of many images one below the other, however many each image kept.

        Args:
            key: A key with an axis of queries, such as `query_embeddings`.
            image_ids: Which images, in which order; by default all.
            progress: Show a progress bar; by default for more than 1000 images or after two seconds.

        Returns:
            `image_ids` `[N]`, `queries` `[N]` and `values` `[N, ...]`; `decoder_output` gives `[N, L, d]`.

        Raises:
            KeyError: The store holds no such image.
            ValueError: The files hold no such key, it has no queries, no image was chosen, or two shapes differ.
        """
        ids = self._chosen(key, image_ids, None)
        counts = None if self.min_score is None else [self.entry(image_id).num_queries or 0 for image_id in ids]
        return read_rows(self._tensors, key, ids, counts, progress)

    def queries(self, image_id: SupportsIndex, count: int) -> Tensor:
        """Return which queries an image's tensors hold, `[count]`; all, where all were kept."""
        return torch.arange(count) if self.min_score is None else self.load(image_id, QUERY_INDEX)

    def positions(self, image_id: SupportsIndex, queries: Tensor) -> Tensor:
        """Return the places of some queries in an image's tensors.

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
        """Return a view for a `DataLoader`, for example to train a probe. Each item is read when it is asked for.

        Args:
            key: One of `embedding_keys`.
            image_ids: Which images, in which order; by default all, or those that have a target.
            pool: As for `stack`.
            targets: What to give beside each tensor, by image id; by default the image id itself.

        Raises:
            KeyError: The store holds no such image.
            ValueError: The files hold no such key, it cannot be pooled, or no image was chosen.
        """
        if image_ids is None and targets is not None:
            image_ids = [image_id for image_id in self if image_id in targets]
        return EmbeddingDataset(self._tensors, self._chosen(key, image_ids, pool), key, pool, targets)

    def feature_map(self, image_id: SupportsIndex, key: str = "encoder_output", level: int = 0) -> Tensor:
        """Return a tensor with its places folded back to a map of the image.

        Args:
            image_id: One of `image_ids`.
            key: `encoder_output` becomes `[d, H, W]`, `encoder_layers` `[L, d, H, W]`, `cross_attention`
                `[L, Q, H, W]`; `backbone_features` are a map already, of the backbone's last level.
            level: Which feature map, where the model has several: 0 is the first, with most models the finest.

        Raises:
            UnknownImageError: The store holds no such image.
            SettingError: The files hold no such key, it has no places, or there is no such level.
        """
        check_choice("key", key, ("encoder_output", "encoder_layers", "cross_attention", "backbone_features"))
        tensor = self.load(image_id, key)
        if key == "backbone_features":
            return tensor
        levels = self._levels(image_id)
        if not 0 <= level < len(levels):
            raise SettingError(f"level is {level}; image {image_id} has levels 0 to {len(levels) - 1}.")
        if key != "cross_attention":
            tensor = tensor.transpose(-1, -2)  # [..., d, H*W]
        height, width = levels[level]
        places: Tensor = tensor.split([h * w for h, w in levels], dim=-1)[level]
        return places.reshape(*places.shape[:-1], height, width)

    def _levels(self, image_id: SupportsIndex) -> tuple[Size, ...]:
        features = self.entry(image_id).features
        if features is None:
            raise InputError(f"{self.name}/{METADATA} has no feature_size for image {image_id}.")
        return features.levels

    def _chosen(self, key: str, image_ids: Iterable[int] | None, pool: str | None) -> list[int]:
        """Check what `stack` and `dataset` were asked for and return the ids."""
        self.require(key)
        if pool is not None:
            check_choice("pool", pool, POOLS)
            if key not in POOLED_AXES:
                raise SettingError(f"{key} cannot be pooled; {', '.join(POOLED_AXES)} can.")
        ids = self.image_ids if image_ids is None else list(map(self._known, image_ids))
        if not ids:
            raise SettingError(f"No image of {self.name} was chosen. It holds {len(self)} images.")
        return ids


def _advice(key: str) -> str:
    ways = ["pool it (pool='mean' or 'max')"] if key in POOLED_AXES else []
    ways += [f"read its queries one below the other (store.rows({key!r}))"] if "queries" in AXES[key] else []
    ways += ["choose images of one size"] if key in SPATIAL else []
    text = ", or ".join(ways)
    return f" {text[0].upper()}{text[1:]}." if text else ""
