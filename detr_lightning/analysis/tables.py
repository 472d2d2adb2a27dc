"""Tables of objects as Parquet files."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from detr_lightning.analysis.reader import ObjectReader
from detr_lightning.errors import MissingPackageError
from detr_lightning.format.files import replacing
from detr_lightning.format.names import METADATA
from detr_lightning.store.export import output_path
from detr_lightning.store.store import EmbeddingStore

try:
    import pyarrow as pa
    from pyarrow import parquet
except ImportError as missing:
    raise MissingPackageError("Tables need pyarrow: pip install 'detr-lightning[analysis]'.") from missing

if TYPE_CHECKING:
    import pandas as pd

ROWS = 8192
"""The rows of a row group: about 10 MB with vectors of 256 numbers."""

_TEXTS = ["file_name", "category", "area_class", "outcome", "annotated_category"]

SOURCE = b"detr_lightning"
"""The key in a file's metadata that stores the origin of its objects, as JSON."""


def write_objects(
    store: EmbeddingStore,
    output: str | os.PathLike[str],
    threshold: float = 0.7,
    *,
    image_ids: Iterable[int] | None = None,
    key: str | None = "query_embeddings",
    layer: int = -1,
    annotation_file: str | os.PathLike[str] | None = None,
    iou: float = 0.5,
    overwrite: bool = True,
    progress: bool | None = None,
) -> Path:
    """Write the table of `objects` to a Parquet file, whole or not at all, with memory for a few images only.

    The columns are those of `detr_lightning.analysis.objects.objects`; `embedding` is a list of fixed size. The
    file's own metadata records the store, the model and the settings, under `detr_lightning`.

    Args:
        store: As for `objects`.
        output: A file that ends in `.parquet`. Missing folders are created.
        threshold: As for `objects`.
        image_ids: As for `objects`.
        key: As for `objects`.
        layer: As for `objects`.
        annotation_file: As for `objects`.
        iou: As for `objects`.
        overwrite: Whether to replace an existing file.
        progress: As for `objects`.

    Returns:
        The path of the file.

    Raises:
        OSError: The file cannot be written.
        DETRLightningError: As for `objects`, or the output is not allowed.
    """
    path = output_path(store, output, ".parquet", overwrite)
    reader = ObjectReader(store, threshold, image_ids, key, layer, annotation_file, iou)
    if not stream(reader, path, progress).total():
        warnings.warn(reader.nothing_found(), stacklevel=2)
    return path


def stream(reader: ObjectReader, path: Path, progress: bool | None = None, *, cached: bool = False) -> Counter[str]:
    """Write the objects of a reader to a Parquet file, and return how many had each outcome.

    Args:
        reader: The reader.
        path: The file.
        progress: As for `objects`.
        cached: Record that `search` and `explore` may replace the file.
    """
    counts: Counter[str] = Counter()
    schema = _schema(reader, cached)
    with replacing(path) as file, parquet.ParquetWriter(file, schema, use_dictionary=_TEXTS) as writer:
        waiting: list[pa.Table] = []
        for block in reader.blocks(progress):
            waiting.append(pa.table([_array(block[field.name], field.type) for field in schema], schema=schema))
            counts.update(block["outcome"] if "outcome" in block else {"objects": len(block["image_id"])})
            if sum(map(len, waiting)) >= ROWS:
                writer.write_table(pa.concat_tables(waiting))
                waiting.clear()
        if waiting:
            writer.write_table(pa.concat_tables(waiting))
    return +counts


def write(table: pd.DataFrame, path: str | os.PathLike[str]) -> Path:
    """Write a table of `objects` or `match` to a Parquet file, whole or not at all; `pandas.read_parquet` reads it.

    Raises:
        OSError: The file cannot be written.
    """
    path = Path(path).expanduser()
    plain = table.copy()
    for column in plain.columns:
        if plain[column].map(lambda value: isinstance(value, dict)).any():
            plain[column] = plain[column].map(json.dumps, na_action="ignore")
    schema = pa.Schema.from_pandas(plain, preserve_index=False)
    vectors = [value for value in plain.get("embedding", ()) if isinstance(value, np.ndarray)]
    if vectors:
        schema = schema.set(schema.get_field_index("embedding"), pa.field("embedding", _vector(len(vectors[0]))))
    with replacing(path) as file:
        parquet.write_table(pa.Table.from_pandas(plain, schema, preserve_index=False), file, row_group_size=ROWS)
    return path


def fingerprint(path: Path) -> str:
    """Return the sha256 of a Parquet file's footer, which records the position, size and range of every column."""
    with open(path, "rb") as file:
        file.seek(-8, os.SEEK_END)
        length = int.from_bytes(file.read(4), "little")
        file.seek(-8 - length, os.SEEK_END)
        return hashlib.sha256(file.read(length)).hexdigest()


def _schema(reader: ObjectReader, cached: bool) -> pa.Schema:
    types = dict.fromkeys(reader.columns, pa.float64())
    types |= dict.fromkeys(("image_id", "query", "category_id", "annotated_category_id"), pa.int64())
    types |= dict.fromkeys(_TEXTS, pa.string())
    types["bbox"] = pa.list_(pa.float64(), 4)
    if reader.ground_truth:
        types["annotation_id"] = pa.string() if reader.ground_truth.text_ids else pa.int64()
    if reader.key:
        types["embedding"] = _vector(reader.no_rows["embedding"].shape[1])
    source = describe(reader.store, reader) | ({"cached": True} if cached else {})
    return pa.schema([(name, types[name]) for name in reader.columns], {SOURCE: json.dumps(source)})


def describe(store: EmbeddingStore, reader: ObjectReader | None = None) -> dict[str, Any]:
    """Return the origin of a table's objects, as its file records it: the store, and how its objects were read."""
    model = store.metadata_file.model
    metadata = None if store.folder is None else store.folder / METADATA
    source: dict[str, Any] = {
        "folder": store.location,
        "model_sha256": model and model.sha256,
        "images": len(store),
        "written": metadata.stat().st_mtime_ns if metadata and metadata.is_file() else None,
    }
    if reader is not None:
        given = reader.annotation_file
        annotations = None if given is None else Path(given).expanduser().resolve()
        source |= {"key": reader.key, "layer": reader.layer, "threshold": reader.threshold, "iou": reader.iou}
        source["annotations"] = [str(annotations), annotations.stat().st_mtime_ns] if annotations else None
    return source


def _vector(width: int) -> pa.DataType:
    return pa.list_(pa.float32(), width)


def _array(values: np.ndarray, type: pa.DataType) -> pa.Array:
    if values.ndim == 1:
        return pa.array(values, type, from_pandas=True)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=type)
