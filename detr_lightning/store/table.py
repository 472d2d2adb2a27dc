"""A Lance table behind `EmbeddingStore`: its metadata, and its tensors by image id."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from detr_lightning.errors import InputError, SettingError
from detr_lightning.format import object_store
from detr_lightning.format.entries import ImageEntry, SkippedImage
from detr_lightning.format.files import json_is_unchanged
from detr_lightning.format.metadata import AGAIN, MetadataFile, parse_metadata
from detr_lightning.format.names import METADATA, is_url
from detr_lightning.format.schema import LANCE, Metadata
from detr_lightning.format.table import PLANNED, Table, TableReader

_ROWS_AT_ONCE = 256


class TableTensors:
    """The tensors of a table.

    Each process opens the table itself, when it first reads.

    Args:
        output_dir: The folder or URL that contains the table.
    """

    def __init__(self, output_dir: str) -> None:
        self.output_dir = output_dir
        self._reader: TableReader | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the reader, which belongs to this process."""
        return {"output_dir": self.output_dir, "_reader": None}

    @property
    def reader(self) -> TableReader:
        """The table, opened in this process.

        Raises:
            SettingError: The process was forked from one that had imported Lance.
        """
        if os.getpid() != object_store.IMPORTED_BY:
            raise SettingError(
                f"{self.output_dir} is a Lance table, which forked processes cannot read. Start data workers with "
                "DataLoader(..., multiprocessing_context='spawn')."
            )
        if self._reader is None:
            self._reader = TableReader(self.output_dir)
        return self._reader

    @property
    def bytes_on_disk(self) -> int:
        """The bytes of all tensors as stored."""
        return Table(self.output_dir).nbytes

    def load(self, image_id: int) -> dict[str, Tensor]:
        """Return all tensors of an image."""
        keys = self.reader.keys
        (row,) = self.reader.read([image_id], keys)
        return dict(zip(keys, row, strict=True))

    def read(self, image_id: int, key: str) -> Tensor:
        """Return one tensor of an image, without reading the others."""
        ((tensor,),) = self.reader.read([image_id], [key])
        return tensor

    def each(self, image_ids: Sequence[int], key: str, use: Callable[[int, Tensor], None]) -> Iterator[None]:
        """Call `use(index, tensor)` for each of many images, and yield after each."""
        for start in range(0, len(image_ids), _ROWS_AT_ONCE):
            rows = self.reader.read(image_ids[start : start + _ROWS_AT_ONCE], [key])
            for index, (tensor,) in enumerate(rows, start=start):
                use(index, tensor)
                yield


class TableMetadata(MetadataFile):
    """The `metadata.json` of a table; its images are in the table's rows.

    Args:
        content: The content of the file, as JSON.
        tensors: The table's tensors.
        changed: Whether the file was changed after it was written.
    """

    def __init__(self, content: dict[str, Any], tensors: TableTensors, changed: bool = False) -> None:
        self.content = content
        self.path = Path(tensors.output_dir, METADATA)
        self.changed = changed
        self._tensors = tensors

    @cached_property
    def image_ids(self) -> list[int]:
        """The ids of all images, ascending."""
        return list(map(int, self._tensors.reader.image_ids))

    def __contains__(self, image_id: int) -> bool:
        return self._tensors.reader.row_of(image_id) is not None

    def entry(self, image_id: int) -> ImageEntry:
        """Return an image's entry.

        Raises:
            KeyError: There is no such image.
        """
        return self._tensors.reader.entry(image_id)

    def entries(self) -> Iterator[Any]:
        """Yield the JSON objects of the finished and skipped images."""
        yield from (entry.to_json() for entry, _ in Table(self._tensors.output_dir).entries())


def open_table(output_dir: str, partial: bool = False) -> tuple[TableMetadata, TableTensors]:
    """Return the metadata and the tensors of a table.

    Args:
        output_dir: The folder or URL that contains the table.
        partial: Also read an unfinished extraction: the rows committed so far.

    Raises:
        FileNotFoundError: There is no table, or its extraction has not finished and `partial` is False.
        InputError: Its `metadata.json` or its dataset is damaged or another program's.
        OSError: The object store does not answer, or refuses.
    """
    path = Path(output_dir, METADATA)
    data = (
        object_store.read_file(output_dir, METADATA)
        if is_url(output_dir)
        else path.read_bytes()
        if path.is_file()
        else None
    )
    if data is None:
        if not object_store.exists(output_dir):
            raise FileNotFoundError(f"{output_dir} has no {METADATA} and no table. Give the output of an extraction.")
        if partial:
            return _so_far(output_dir)
        raise FileNotFoundError(f"{output_dir} holds an unfinished extraction. {AGAIN}")
    content = parse_metadata(data, f"{output_dir}/{METADATA}")
    if content.get("layout") != LANCE:
        raise InputError(
            f"{output_dir}/{METADATA} does not belong to the table beside it. Remove it and extract again."
        )
    tensors = TableTensors(output_dir)
    return TableMetadata(content, tensors, "checksum" in content and not json_is_unchanged(data)), tensors


def _so_far(output_dir: str) -> tuple[TableMetadata, TableTensors]:
    """Return the rows that an unfinished extraction has committed, as if it had ended with them."""
    table, tensors = Table(output_dir), TableTensors(output_dir)
    skipped = [entry for entry, _ in table.entries(skipped=True) if isinstance(entry, SkippedImage)]
    content = Metadata(run=table.record, images=(), failed=skipped, layout=LANCE).to_json()
    metadata = TableMetadata({**content, "num_images": len(tensors.reader.image_ids)}, tensors)
    metadata.partial = True
    if planned := table.config.get(PLANNED):
        metadata.num_planned = int(planned)
    return metadata, tensors
