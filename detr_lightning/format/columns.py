"""The columns of a table, and the conversion of images to rows and back.

A row is one image. Each key is a column, nested by axis: `query_embeddings` `[100, 256]` is a fixed-size list of 100
fixed-size lists of 256 numbers. An axis whose length differs between images is a list, and so is every axis outside it:
Lance has no fixed-size lists of lists.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detr_lightning.errors import InputError
from detr_lightning.format.entries import ImageEntry, SkippedImage, shared_features, shared_size
from detr_lightning.format.keys import AXES, FeatureSizes, dtype_of, shape_of
from detr_lightning.format.object_store import pa
from detr_lightning.format.schema import RunRecord

RECORD = b"detr_lightning"
"""The key of the run's record in the metadata of the dataset's schema, where it is stored as JSON."""

Row = tuple[ImageEntry | SkippedImage, Mapping[str, Tensor]]
"""An image's entry and its tensors; no tensors if the image was skipped."""

_PAIR = pa.list_(pa.int32(), 2)
FIELDS = {
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
    "orientation": pa.int32(),
    "error": pa.string(),
}
"""The columns that describe an image. They come before those of the keys."""


def table_schema(record: RunRecord, features: FeatureSizes) -> pa.Schema:
    """Return the schema of a run's table.

    Args:
        record: The run. Its keys, dtype and model determine the columns, and the schema's metadata stores it.
        features: The feature maps of one image.
    """
    settings = record.settings
    fixed_size = settings.preprocessing.get("height") is not None
    varying = set() if fixed_size else {"places", "height", "width"}
    varying |= {"queries"} if settings.min_score is not None else set()
    unused = ("feature_size",) if len(features.levels) > 1 else ("feature_sizes", "backbone_size")
    columns = [(name, kind) for name, kind in FIELDS.items() if name not in unused]
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
    """Convert rows to a batch of a table, in the same order. A skipped image has the reason as `error`, no tensors.

    Raises:
        InputError: An image's tensors are not those of the table.
    """
    keys = {name for name in schema.names if name not in FIELDS}
    for entry, tensors in rows:
        if tensors and tensors.keys() != keys:
            raise InputError(
                f"image {entry.image_id} has {', '.join(tensors)}, but the table has columns for "
                f"{', '.join(sorted(keys))}."
            )
    described = [_described(entry) for entry, _ in rows]
    columns = [
        pa.array([row.get(field.name) for row in described], field.type)
        if field.name in FIELDS
        else _nested([tensors.get(field.name) for _, tensors in rows], field.type)
        for field in schema
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def to_tensors(column: pa.ChunkedArray, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Convert a column without nulls to one tensor per row, of the given shapes, each in its own memory."""
    values = torch.from_numpy(np.concatenate([_values(chunk) for chunk in column.chunks]))
    sizes = [torch.Size(shape).numel() for shape in shapes]
    return [part.view(*shape).clone() for part, shape in zip(values.split(sizes), shapes, strict=True)]


def to_entries(rows: pa.Table | pa.RecordBatch) -> Iterator[ImageEntry | SkippedImage]:
    """Yield the entry of each row. Values are converted column by column, which is faster than row by row."""
    names = rows.schema.names
    columns = [rows[name].to_pylist() if name in names else itertools.repeat(None) for name in FIELDS]
    for row in zip(*columns, strict=False):
        image_id, file_name, width, height, input_size, level, levels, backbone, num_queries, sha256, turn, error = row
        if error is not None:
            yield SkippedImage(image_id, file_name, error)
            continue
        sizes = tuple(shared_size(*size) for size in ([level] if levels is None else levels))
        features = shared_features(sizes, sizes[0] if backbone is None else shared_size(*backbone))
        yield ImageEntry(
            image_id,
            file_name,
            width,
            height,
            shared_size(*input_size),
            features,
            num_queries=num_queries,
            image_sha256=sha256,
            orientation=turn,
        )


def _described(entry: ImageEntry | SkippedImage) -> dict[str, Any]:
    content = entry.to_json()
    return {"image_id": content.pop("id"), "error": content.pop("reason", None), **content}


def _nested(tensors: Sequence[Tensor | None], kind: pa.DataType) -> pa.Array:
    """Return the column of a key: the images' values, one after the other, as nested lists."""
    lengths = []  # per axis: its length if that is fixed, else None
    inner = kind
    while pa.types.is_list(inner) or pa.types.is_fixed_size_list(inner):
        lengths.append(inner.list_size if pa.types.is_fixed_size_list(inner) else None)
        inner = inner.value_type
    missing = pa.array([tensor is None for tensor in tensors])
    empty = np.zeros([length or 0 for length in lengths], inner.to_pandas_dtype())
    arrays = [empty if tensor is None else tensor.numpy() for tensor in tensors]
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
