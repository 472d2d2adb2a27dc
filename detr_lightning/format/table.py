"""One Lance dataset instead of a million files: its columns, and images to rows and back.

A row is one image. Each key is a column, nested by axis: `query_embeddings` `[100, 256]` is a fixed-size list of 100
fixed-size lists of 256 numbers. An axis whose length differs between images is a list, and so is every axis outside it:
Lance has no fixed-size list of lists.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detr_lightning.errors import InputError, MissingPackageError
from detr_lightning.format.entries import ImageEntry, SkippedImage
from detr_lightning.format.keys import AXES, FeatureSizes, dtype_of, shape_of
from detr_lightning.format.names import TABLE, is_url
from detr_lightning.format.schema import RunRecord

# Read when Lance is first imported: it reports on stderr that a new dataset is new.
os.environ.setdefault("LANCE_LOG", "error")

try:
    import lance
    import pyarrow as pa
    from lance.file import LanceFileSession
    from lance.fragment import write_fragments
except ImportError as missing:
    raise MissingPackageError(
        "One table (writer.layout: lance) needs pip install 'detr-lightning[lance]'."
    ) from missing

RECORD = b"detr_lightning"
"""The key of the dataset's schema metadata that holds the record of the run which made it, as JSON."""

ROWS_AT_ONCE = 8
"""Rows that Lance is given at a time: it holds several such batches in memory."""

Row = tuple[ImageEntry | SkippedImage, Mapping[str, Tensor]]
"""An image's entry and its tensors; none where it was skipped."""

_PAIR = pa.list_(pa.int32(), 2)
_FIELDS = {
    "image_id": pa.int64(),
    "file_name": pa.string(),
    "width": pa.int32(),
    "height": pa.int32(),
    "input_size": _PAIR,
    "feature_size": _PAIR,
    "feature_sizes": pa.list_(_PAIR),
    "backbone_size": _PAIR,
    "num_queries": pa.int32(),
    "image_sha256": pa.string(),
    "error": pa.string(),
}
"""The columns that describe an image. They stand before those of the keys."""


def table_schema(record: RunRecord, features: FeatureSizes) -> pa.Schema:
    """Return the columns of a run's table.

    Args:
        record: The run; its keys, dtype and model decide the columns, and the schema's metadata holds it.
        features: The feature maps of one image.
    """
    settings = record.settings
    fixed_size = settings.preprocessing.get("height") is not None
    varying = set() if fixed_size else {"places", "height", "width"}
    varying |= {"queries"} if settings.min_score is not None else set()
    unused = ("feature_size",) if len(features.levels) > 1 else ("feature_sizes", "backbone_size")
    columns = [(name, kind) for name, kind in _FIELDS.items() if name not in unused]
    for key in settings.keys:
        kind = pa.from_numpy_dtype(torch.empty(0, dtype=dtype_of(key, settings.dtype)).numpy().dtype)
        fixed = True
        axes = zip(AXES[key], shape_of(key, settings.model.shape, features), strict=True)
        for axis, length in reversed(list(axes)):
            fixed = fixed and axis not in varying
            kind = pa.list_(kind, length) if fixed else pa.list_(kind)
        columns.append((key, kind))
    return pa.schema(columns, metadata={RECORD: json.dumps(record.to_json()).encode()})


def to_batch(schema: pa.Schema, rows: Sequence[Row]) -> pa.RecordBatch:
    """Return rows of a table, in their order. A skipped image has its reason as `error`, and no tensors."""
    described = [_described(entry) for entry, _ in rows]
    columns = [
        pa.array([row.get(field.name) for row in described], field.type)
        if field.name in _FIELDS
        else _nested([tensors.get(field.name) for _, tensors in rows], field.type)
        for field in schema
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def to_tensors(column: pa.ChunkedArray, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return the values of rows, none of them null, as tensors of these shapes, each with memory of its own."""
    values = torch.from_numpy(np.concatenate([_values(chunk) for chunk in column.chunks]))
    sizes = [torch.Size(shape).numel() for shape in shapes]
    return [part.view(*shape).clone() for part, shape in zip(values.split(sizes), shapes, strict=True)]


class Table:
    """A dataset in its output folder, at its latest version.

    Args:
        output_dir: The folder, or its URL on an object store.

    Raises:
        FileNotFoundError: There is no table.
        InputError: The dataset there was not made by this program.
        OSError: The object store does not answer, or refuses.
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
        """Make an empty table. Of two processes that try, one raises.

        Raises:
            OSError: There is a table already, or it cannot be written.
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
        """The columns."""
        return self.dataset.schema

    @property
    def nbytes(self) -> int:
        """The bytes of all rows on disk."""
        files = [file for fragment in self.dataset.get_fragments() for file in fragment.data_files()]
        return sum(file.file_size_bytes or 0 for file in files)

    @property
    def config(self) -> dict[str, str]:
        """The dataset's own key-value pairs."""
        return dict(self.dataset.config())

    def entries(self, skipped: bool = False) -> Iterator[tuple[ImageEntry | SkippedImage, int]]:
        """Yield each row's entry, and the row's id for `delete`. No tensor is read.

        Args:
            skipped: Only the images that were skipped.
        """
        names = [name for name in self.schema.names if name in _FIELDS]
        condition = "error IS NOT NULL" if skipped else None
        with explained(self.uri):
            for batch in self.dataset.scanner(columns=names, filter=condition, with_row_id=True).to_batches():
                for row in batch.to_pylist():
                    yield _entry(row), row["_rowid"]

    def has_all(self, image_ids: Collection[int]) -> bool:
        """Return whether each of these images has a row."""
        with explained(self.uri):
            there = self.dataset.to_table(columns=["image_id"])["image_id"]
        return set(image_ids) <= set(there.to_pylist())

    def append(self, fragments: Sequence[Any]) -> None:
        """Commit fragments of `write_rows` as a new version."""
        with explained(self.uri):
            self.dataset = lance.LanceDataset.commit(
                self.uri, lance.LanceOperation.Append(list(fragments)), read_version=self.version
            )

    def delete(self, row_ids: Sequence[int]) -> None:
        """Remove rows."""
        with explained(self.uri):
            for start in range(0, len(row_ids), 1000):
                listed = ", ".join(map(str, row_ids[start : start + 1000]))
                self.dataset.delete(f"_rowid IN ({listed})")

    def empty(self, schema: pa.Schema) -> None:
        """Remove all rows, and take other columns."""
        with explained(self.uri):
            self.dataset = lance.write_dataset(schema.empty_table(), self.uri, mode="overwrite")

    def configure(self, values: Mapping[str, str | None]) -> None:
        """Set the dataset's own key-value pairs; None removes one."""
        with explained(self.uri):
            self.dataset.update_config(dict(values))

    def optimise(self, fragment_bytes: int) -> None:
        """Join fragments that are smaller than this, and index the image ids."""
        with explained(self.uri):
            if rows := self.dataset.count_rows():
                # Larger ones stay as they are: joining them would write everything again.
                self.dataset.optimize.compact_files(
                    target_rows_per_fragment=max(1, rows * fragment_bytes // max(self.nbytes, 1))
                )
                self.dataset = lance.dataset(self.uri)
                self.dataset.create_scalar_index("image_id", "BTREE", replace=True)
            self.dataset = lance.dataset(self.uri)

    def remove_old_versions(self) -> None:
        """Remove all versions but the latest, and the files that only they use. No other run may be at work."""
        with explained(self.uri):
            self.dataset = lance.dataset(self.uri)
            self.dataset.cleanup_old_versions(older_than=timedelta(0))


class TableReader:
    """Reads the finished images of a table by their ids.

    Args:
        output_dir: The folder, or its URL on an object store.

    Attributes:
        keys: The keys that each image has.
        image_ids: The ids of the finished images, ascending.

    Raises:
        FileNotFoundError: There is no table.
        InputError: The dataset there was not made by this program.
        OSError: The object store does not answer, or refuses.
    """

    def __init__(self, output_dir: str | os.PathLike[str]) -> None:
        self._table = Table(output_dir)
        self.keys = self._table.record.settings.keys
        self._shape = self._table.record.settings.model.shape
        names = [name for name in self._table.schema.names if name in _FIELDS]
        with explained(self._table.uri):
            rows = self._table.dataset.scanner(columns=names, scan_in_order=True).to_table()
        ids = rows["image_id"].to_numpy()
        places = np.flatnonzero(rows["error"].is_null().to_numpy())  # A row's place, as `take` counts.
        self._places = places[np.argsort(ids[places], kind="stable")]
        self._rows = rows.drop_columns(["error"]).combine_chunks()
        self.image_ids = ids[self._places]

    def row_of(self, image_id: int) -> int | None:
        """Return an image's place in the table; None where there is no such image."""
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
        (row,) = self._rows.slice(place, 1).to_pylist()
        entry = _entry({**row, "error": None})
        assert isinstance(entry, ImageEntry)
        return entry

    def read(self, image_ids: Sequence[int], keys: Sequence[str]) -> list[list[Tensor]]:
        """Return, for each image in the order given, the tensors of these keys, in theirs.

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
        assert entry.features is not None, "a finished image has them"
        return shape_of(key, self._shape, entry.features, entry.num_queries)


def write_rows(output_dir: str | os.PathLike[str], schema: pa.Schema, rows: Sequence[Row]) -> list[Any]:
    """Write rows to files of the dataset that no version uses until `Table.append` commits them.

    Raises:
        OSError: They cannot be written.
    """
    starts = range(0, len(rows), ROWS_AT_ONCE)
    batches = (to_batch(schema, rows[start : start + ROWS_AT_ONCE]) for start in starts)
    with explained(table_uri(output_dir)):
        reader = pa.RecordBatchReader.from_batches(schema, batches)
        return list(write_fragments(reader, table_uri(output_dir), schema=schema))


def table_uri(output_dir: str | os.PathLike[str]) -> str:
    """Return where the dataset of an output folder is."""
    return f"{os.fspath(output_dir).rstrip('/')}/{TABLE}"


def exists(output_dir: str | os.PathLike[str]) -> bool:
    """Return whether an output folder has a table.

    Raises:
        OSError: The object store does not answer, or refuses.
    """
    with explained(os.fspath(output_dir)):
        return bool(LanceFileSession(table_uri(output_dir)).list("_versions"))


def read_file(output_dir: str, name: str) -> bytes | None:
    """Return the content of a small file on an object store; None where it does not exist.

    Raises:
        OSError: The object store does not answer, or refuses.
    """
    with explained(output_dir), tempfile.TemporaryDirectory() as folder:
        session, copy = LanceFileSession(output_dir.rstrip("/")), Path(folder, "copy")
        if not session.contains(name):
            return None
        session.download_file(name, copy)
        return copy.read_bytes()


def write_file(output_dir: str, name: str, content: bytes) -> None:
    """Write a small file to an object store, whole or not at all.

    Raises:
        OSError: The object store does not answer, or refuses.
    """
    with explained(output_dir), tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        copy.write_bytes(content)
        LanceFileSession(output_dir.rstrip("/")).upload_file(copy, name)


def remove_file(output_dir: str, name: str) -> None:
    """Remove a file from an object store.

    Raises:
        OSError: The object store does not answer, or refuses.
    """
    with explained(output_dir):
        LanceFileSession(output_dir.rstrip("/")).delete_file(name)


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turn Lance's errors into one that names the table and what to do.

    Raises:
        OSError: Whatever Lance raised for a disk or an object store.
    """
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, InputError | FileNotFoundError):
            raise
        reason = str(error).partition(", /home")[0].strip().splitlines()[0]
        advice = "Check the address and the credentials in the environment." if is_url(uri) else _local_advice(reason)
        raise OSError(f"{uri}: {reason}. {advice}") from error


def _local_advice(reason: str) -> str:
    if "No space left" in reason or "os error 28" in reason:
        return "Free some space, then run the same command again: what was committed is kept."
    return "Check the disk, then run the same command again: what was committed is kept."


def _entry(row: Mapping[str, Any]) -> ImageEntry | SkippedImage:
    content = {name: value for name, value in row.items() if value is not None and name in _FIELDS}
    content["id"] = content.pop("image_id")
    if row["error"] is None:
        return ImageEntry.from_json(content)
    return SkippedImage.from_json({**content, "reason": content["error"]})


def _described(entry: ImageEntry | SkippedImage) -> dict[str, Any]:
    content = entry.to_json()
    return {"image_id": content.pop("id"), "error": content.pop("reason", None), **content}


def _nested(tensors: Sequence[Tensor | None], kind: pa.DataType) -> pa.Array:
    """Return a column of a key: the images' values, one after the other, in lists of lists."""
    lengths = []  # of each axis: a number where it is fixed, else None
    inner = kind
    while pa.types.is_list(inner) or pa.types.is_fixed_size_list(inner):
        lengths.append(inner.list_size if pa.types.is_fixed_size_list(inner) else None)
        inner = inner.value_type
    missing = pa.array([tensor is None for tensor in tensors])
    nothing = np.zeros([length or 0 for length in lengths], inner.to_pandas_dtype())
    arrays = [nothing if tensor is None else tensor.numpy() for tensor in tensors]
    column = pa.array(np.concatenate([array.reshape(-1) for array in arrays]))
    for axis in range(len(lengths) - 1, -1, -1):
        mask = missing if axis == 0 else None
        if (length := lengths[axis]) is not None:
            column = pa.FixedSizeListArray.from_arrays(column, length, mask=mask)
        else:
            counts = [np.full(int(np.prod(array.shape[:axis])), array.shape[axis]) for array in arrays]
            offsets = np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int32)
            column = pa.ListArray.from_arrays(pa.array(offsets), column, mask=mask)
    return column


def _values(array: pa.Array) -> np.ndarray:
    while pa.types.is_list(array.type) or pa.types.is_fixed_size_list(array.type):
        array = array.flatten()
    return np.asarray(array.to_numpy(zero_copy_only=False))
