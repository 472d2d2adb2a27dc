"""One Lance dataset instead of a million files: written in versions, read by image id."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
from torch import Tensor

from detr_lightning.errors import InputError
from detr_lightning.format.columns import FIELDS, RECORD, Row, to_batch, to_entries, to_tensors
from detr_lightning.format.entries import ImageEntry, SkippedImage
from detr_lightning.format.keys import shape_of
from detr_lightning.format.object_store import exists, explained, lance, pa, table_uri
from detr_lightning.format.schema import RunRecord

PLANNED = "detr_lightning.num_planned"
"""The key of the dataset's config under which a run records how many images the table will have."""

ROWS_AT_ONCE = 8
"""The rows in a batch that is passed to Lance, which keeps several batches in memory."""


class Table:
    """The dataset in an output folder, at its latest version.

    Args:
        output_dir: The folder, or its URL on an object store.

    Raises:
        FileNotFoundError: There is no table.
        InputError: The dataset there was not made by this program.
        OSError: The object store does not respond, or denies access.
    """

    def __init__(self, output_dir: str | os.PathLike[str]) -> None:
        self.uri = table_uri(output_dir)
        if not exists(output_dir):
            raise FileNotFoundError(f"{self.uri} does not exist.")
        with explained(self.uri):
            self.dataset = lance.dataset(self.uri)
        content = (self.schema.metadata or {}).get(RECORD)
        if content is None or "image_id" not in self.schema.names:
            raise InputError(f"{self.uri} is another program's Lance dataset. Choose another output_dir.")
        self.record = RunRecord.from_json(json.loads(content))

    @classmethod
    def create(cls, output_dir: str | os.PathLike[str], schema: pa.Schema) -> Table:
        """Create an empty table. If two processes try at once, one of them raises.

        Raises:
            OSError: The table exists already, or cannot be written.
        """
        with explained(table_uri(output_dir)):
            lance.write_dataset(schema.empty_table(), table_uri(output_dir), mode="create")
        return cls(output_dir)

    @property
    def version(self) -> int:
        """The number of this version."""
        return int(self.dataset.version)

    @property
    def schema(self) -> pa.Schema:
        """The columns of the table."""
        return self.dataset.schema

    @property
    def nbytes(self) -> int:
        """The size of all rows on disk, in bytes."""
        files = [file for fragment in self.dataset.get_fragments() for file in fragment.data_files()]
        return sum(file.file_size_bytes or 0 for file in files)

    @property
    def config(self) -> dict[str, str]:
        """The dataset's own key-value pairs."""
        return dict(self.dataset.config())

    def entries(self, skipped: bool = False) -> Iterator[tuple[ImageEntry | SkippedImage, int]]:
        """Yield each row's entry, and the row's id for `delete`. No tensors are read.

        Args:
            skipped: Yield only the images that were skipped.
        """
        names = [name for name in self.schema.names if name in FIELDS]
        condition = "error IS NOT NULL" if skipped else None
        with explained(self.uri):
            for batch in self.dataset.scanner(columns=names, filter=condition, with_row_id=True).to_batches():
                yield from zip(to_entries(batch), batch["_rowid"].to_pylist(), strict=True)

    def has_all(self, image_ids: Collection[int]) -> bool:
        """Return whether each of these images has a row."""
        with explained(self.uri):
            present = self.dataset.to_table(columns=["image_id"])["image_id"]
        return set(image_ids) <= set(present.to_pylist())

    def append(self, fragments: Sequence[Any]) -> None:
        """Commit the fragments that `write_rows` wrote as a new version."""
        with explained(self.uri):
            self.dataset = lance.LanceDataset.commit(
                self.uri, lance.LanceOperation.Append(list(fragments)), read_version=self.version
            )

    def delete(self, row_ids: Sequence[int]) -> None:
        """Remove rows by their ids."""
        with explained(self.uri):
            for start in range(0, len(row_ids), 1000):
                listed = ", ".join(map(str, row_ids[start : start + 1000]))
                self.dataset.delete(f"_rowid IN ({listed})")

    def record_hashes(self, hashes: Mapping[int, str]) -> None:
        """Set the `image_sha256` of rows, by image id."""
        if hashes:
            columns = [pa.array(hashes.keys(), pa.int64()), pa.array(hashes.values(), pa.string())]
            rows = pa.table(columns, names=["image_id", "image_sha256"])
            with explained(self.uri):
                self.dataset.merge_insert("image_id").when_matched_update_all().execute(rows)

    def empty(self, schema: pa.Schema) -> None:
        """Remove all rows, and replace the columns."""
        with explained(self.uri):
            self.dataset = lance.write_dataset(schema.empty_table(), self.uri, mode="overwrite")

    def configure(self, values: Mapping[str, str | None]) -> None:
        """Set the dataset's own key-value pairs; None removes one."""
        with explained(self.uri):
            self.dataset.update_config(dict(values))

    def optimise(self, fragment_bytes: int) -> None:
        """Merge fragments of fewer than `fragment_bytes` bytes, and index the image ids."""
        with explained(self.uri):
            if rows := self.dataset.count_rows():
                # Larger ones stay as they are: merging them would rewrite everything.
                self.dataset.optimize.compact_files(
                    target_rows_per_fragment=max(1, rows * fragment_bytes // max(self.nbytes, 1))
                )
                self.dataset = lance.dataset(self.uri)
                self.dataset.create_scalar_index("image_id", "BTREE", replace=True)
            self.dataset = lance.dataset(self.uri)

    def remove_old_versions(self) -> None:
        """Remove all versions but the latest, and the files that only they use. No other run may be in progress."""
        with explained(self.uri):
            self.dataset = lance.dataset(self.uri)
            self.dataset.cleanup_old_versions(older_than=timedelta(0))


class TableReader:
    """Reads the finished images of a table by their ids.

    Args:
        output_dir: The folder, or its URL on an object store.

    Attributes:
        keys: The keys of each image.
        image_ids: The ids of the finished images, ascending.

    Raises:
        FileNotFoundError: There is no table.
        InputError: The dataset there was not made by this program.
        OSError: The object store does not respond, or denies access.
    """

    def __init__(self, output_dir: str | os.PathLike[str]) -> None:
        self._table = Table(output_dir)
        self.keys = self._table.record.settings.keys
        self._shape = self._table.record.settings.model.shape
        names = [name for name in self._table.schema.names if name in FIELDS]
        with explained(self._table.uri):
            rows = self._table.dataset.scanner(columns=names, scan_in_order=True).to_table()
        ids = rows["image_id"].to_numpy()
        places = np.flatnonzero(rows["error"].is_null().to_numpy())  # Row numbers, as `take` needs them.
        # In an unfinished table, two runs may have written the same image: its first row counts.
        self._places = places[np.unique(ids[places], return_index=True)[1]]
        self._rows = rows.drop_columns(["error"]).combine_chunks()
        self.image_ids = ids[self._places]

    def row_of(self, image_id: int) -> int | None:
        """Return the number of an image's row, or None if there is no such image."""
        at = int(np.searchsorted(self.image_ids, image_id))
        found = at < len(self.image_ids) and self.image_ids[at] == image_id
        return int(self._places[at]) if found else None

    def entry(self, image_id: int) -> ImageEntry:
        """Return an image's entry.

        Raises:
            KeyError: There is no such image.
        """
        place = self.row_of(image_id)
        if place is None:
            raise KeyError(image_id)
        (entry,) = to_entries(self._rows.slice(place, 1))
        assert isinstance(entry, ImageEntry)
        return entry

    def read(self, image_ids: Sequence[int], keys: Sequence[str]) -> list[list[Tensor]]:
        """Return, for each image, the tensors of these keys, both in the given order.

        Raises:
            KeyError: There is no such image.
        """
        entries = [self.entry(image_id) for image_id in image_ids]
        places = [self.row_of(image_id) for image_id in image_ids]
        with explained(self._table.uri):
            rows = self._table.dataset.take(places, columns=list(keys))
        columns = [to_tensors(rows[key], [self._shape_of(key, entry) for entry in entries]) for key in keys]
        return [list(tensors) for tensors in zip(*columns, strict=True)]

    def _shape_of(self, key: str, entry: ImageEntry) -> tuple[int, ...]:
        assert entry.features is not None, "a finished image has feature sizes"
        return shape_of(key, self._shape, entry.features, entry.num_queries)


def write_rows(output_dir: str | os.PathLike[str], schema: pa.Schema, rows: Sequence[Row]) -> list[Any]:
    """Write rows to new files of the dataset, which no version uses until `Table.append` commits them.

    Raises:
        OSError: The rows cannot be written.
    """
    starts = range(0, len(rows), ROWS_AT_ONCE)
    batches = (to_batch(schema, rows[start : start + ROWS_AT_ONCE]) for start in starts)
    with explained(table_uri(output_dir)):
        reader = pa.RecordBatchReader.from_batches(schema, batches)
        return list(lance.fragment.write_fragments(reader, table_uri(output_dir), schema=schema))
