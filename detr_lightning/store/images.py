"""The images of an extraction: their ids, their records, and where they are."""

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
        folder: Its folder, or None where the store is no folder.
        name: The name that messages use.
        metadata_file: Its metadata.
    """

    folder: Path | None
    name: str
    metadata_file: MetadataFile

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
            raise FileNotFoundError(f"{self.name} does not record where {file_name} is. Give image_dir.")
        path = Path(image_dir).expanduser() / file_name
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist. Give image_dir, the folder in which the images are now.")
        return path

    def require(self, *keys: str) -> None:
        """Check that the files hold these keys.

        Raises:
            ValueError: A key is missing; those that the files hold are named.
        """
        for key in keys:
            if key not in self.embedding_keys:
                hint = did_you_mean(key, self.embedding_keys)
                raise SettingError(
                    f"{self.name} holds no {key!r}, only {', '.join(self.embedding_keys)}.{hint} "
                    f"Name {key} in model.keys and extract into another folder."
                )
