"""The images of an extraction: their ids, their records, and their files."""

from __future__ import annotations

import bisect
import operator
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, SupportsIndex

from torch import Tensor

from detr_lightning.errors import SettingError, UnknownImageError, count, did_you_mean
from detr_lightning.format.entries import ImageEntry
from detr_lightning.format.metadata import MetadataFile
from detr_lightning.format.schema import LANCE


class StoredImages(Mapping[int, dict[str, Tensor]]):
    """The images that the metadata records: the part of `EmbeddingStore` that reads no tensors.

    Attributes:
        folder: The store's folder, or None if it is not a folder.
        name: The store's name in messages.
        metadata_file: The store's metadata.
    """

    folder: Path | None
    name: str
    metadata_file: MetadataFile

    @property
    def is_table(self) -> bool:
        """Whether the store is a Lance table, rather than one file per image or in memory."""
        return self.metadata_file.layout == LANCE

    @property
    def is_partial(self) -> bool:
        """Whether the extraction is unfinished."""
        return self.metadata_file.partial

    @property
    def num_planned(self) -> int | None:
        """How many images the finished extraction will have; None if that is not recorded."""
        return self.metadata_file.num_planned if self.is_partial else len(self)

    @property
    def progress(self) -> str:
        """The number of images, finished and planned: `8 images` or `3 of 8 images, unfinished`."""
        if not self.is_partial:
            return count(len(self), "image")
        planned = "an unknown number of" if self.num_planned is None else str(self.num_planned)
        return f"{len(self)} of {planned} images, unfinished"

    @property
    def location(self) -> str:
        """The absolute path of the store's folder, or the store's name if it is not a folder."""
        return self.name if self.folder is None else str(self.folder.resolve())

    @property
    def metadata(self) -> dict[str, Any]:
        """The content of `metadata.json`."""
        return self.metadata_file.content

    @property
    def image_ids(self) -> list[int]:
        """The ids of all images, ascending."""
        return list(self.metadata_file.image_ids)

    @property
    def embedding_keys(self) -> tuple[str, ...]:
        """The keys of each image's tensors, in the order of the file."""
        return self.metadata_file.embedding_keys

    @property
    def categories(self) -> dict[int, str]:
        """The names of the categories by logit index, which for DETR is the COCO category id; empty if unknown."""
        return self.metadata_file.categories

    @property
    def min_score(self) -> float | None:
        """The score that a query needed to be kept (`writer.min_score`), or None if all queries were kept."""
        return self.metadata_file.min_score

    def __len__(self) -> int:
        return len(self.metadata_file.image_ids)

    def __iter__(self) -> Iterator[int]:
        return iter(self.metadata_file.image_ids)

    def __contains__(self, image_id: object) -> bool:
        return isinstance(image_id, SupportsIndex) and operator.index(image_id) in self.metadata_file

    def __eq__(self, other: object) -> bool:
        return self is other  # Mapping would compare the tensors, which have no single truth value.

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"EmbeddingStore({self.name!r}: {self.progress}, {', '.join(self.embedding_keys)})"

    def entry(self, image_id: SupportsIndex) -> ImageEntry:
        """Return the record of an image: `file_name`, `width`, `height`, `input_size`, `features`, ...

        Raises:
            UnknownImageError: The store has no such image; the message names the nearest ids.
            InputError: Its record is incomplete.
        """
        return self.metadata_file.entry(self._known(image_id))

    def _known(self, image_id: SupportsIndex) -> int:
        """Return an image's id as an integer.

        Raises:
            UnknownImageError: The store has no such image.
        """
        try:
            number = operator.index(image_id)
        except TypeError:
            raise UnknownImageError(
                f"{image_id!r} is not an image id of {self.name}: ids are integers. image_ids lists them, "
                "and entry(image_id).file_name is an image's file."
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

    def image_path(self, image_id: SupportsIndex, image_dir: str | os.PathLike[str] | None = None) -> Path:
        """Return the path of the original image file.

        Args:
            image_id: One of `image_ids`.
            image_dir: Where the images are now; by default where they were when they were extracted.

        Raises:
            UnknownImageError: The store has no such image.
            FileNotFoundError: The image file does not exist, or its folder is not recorded.
        """
        file_name = self.entry(image_id).file_name
        if image_dir is None:
            image_dir = self.metadata_file.image_dir
        if image_dir is None:
            raise FileNotFoundError(f"{self.name} does not record where {file_name} is. Give image_dir.")
        path = Path(image_dir).expanduser() / file_name
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist. Give image_dir, the folder in which the images are now.")
        return path

    def require(self, *keys: str) -> None:
        """Check that the store has these keys.

        Raises:
            SettingError: A key is missing; the message names the available ones.
        """
        for key in keys:
            if key not in self.embedding_keys:
                hint = did_you_mean(key, self.embedding_keys)
                raise SettingError(
                    f"{self.name} has no {key!r}, only {', '.join(self.embedding_keys)}.{hint} "
                    f"Add {key} to model.keys and extract into another folder."
                )
