"""A table of the detected objects: one row per object, with its embedding."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable

import numpy as np

from detr_lightning.errors import MissingPackageError

try:
    import pandas as pd
except ImportError as missing:
    raise MissingPackageError("Tables of objects need pandas: pip install 'detr-lightning[analysis]'.") from missing

from detr_lightning.analysis.reader import CORNERS, ObjectReader
from detr_lightning.analysis.tables import write, write_objects
from detr_lightning.store.store import EmbeddingStore

__all__ = ["CORNERS", "objects", "write", "write_objects"]


def objects(
    store: EmbeddingStore,
    threshold: float = 0.7,
    *,
    image_ids: Iterable[int] | None = None,
    key: str | None = "query_embeddings",
    layer: int = -1,
    annotation_file: str | os.PathLike[str] | None = None,
    iou: float = 0.5,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Return a row for each object query that scores `threshold` or more.

    `write_objects` writes the same table to a Parquet file and needs no more memory for more images.

    Args:
        store: A folder with `pred_logits` and `pred_boxes`.
        threshold: The lowest score, from 0 to 1; 0 returns all queries, including those for "no object".
        image_ids: Which images; by default all.
        key: Where `embedding` comes from: `query_embeddings`, `decoder_output`, or None for a table without embeddings.
        layer: With `decoder_output`, which decoder layer; 0 is the first, -1 the last.
        annotation_file: COCO's `instances_*.json` of these images, or one in its format, to compare each object with.
        iou: The smallest overlap with an annotated object that counts as found.
        progress: Show a progress bar; by default for more than 1000 images or after two seconds.

    Returns:
        The columns `image_id`, `file_name`, `query` (0 to 99 for DETR), `category_id`, `category`, `score`, the corners
        `x1`, `y1`, `x2`, `y2` and COCO's `bbox` `[x, y, width, height]` in pixels of the original image, `area_class`
        (small, medium or large, by the area of the box), and `embedding`, an array for each row:
        `np.stack(table.embedding)` is the matrix. Sorted by image, then by query. If nothing reaches the threshold, the
        table is empty, and a warning names the best score.

        With `annotation_file` also `outcome`, and the annotated object that it refers to: `annotation_id`,
        `annotated_category_id`, `annotated_category`, and the overlap `iou`. An outcome is `matched`, `crowd`, or an
        error: `localization`, `classification`, `duplicate`, `background`, `both`.
        `detr_lightning.analysis.overlap.OUTCOMES` explains each.

    Raises:
        FileNotFoundError: There is no such annotation file.
        UnknownImageError: The store has no such image.
        InputError: The annotation file is not in COCO's format, or does not match the store's images or categories.
        SettingError: The folder lacks a key, or a setting is out of range.
    """
    reader = ObjectReader(store, threshold, image_ids, key, layer, annotation_file, iou)
    table = frame_of(reader, progress)
    if table.empty:
        warnings.warn(reader.nothing_found(), stacklevel=2)
    return table


def frame_of(reader: ObjectReader, progress: bool | None = None) -> pd.DataFrame:
    """Return all objects that a reader finds as a DataFrame."""
    blocks = list(reader.blocks(progress))
    columns = {}
    for name in reader.columns:
        values = np.concatenate([block[name] for block in blocks])
        columns[name] = values.tolist() if name == "bbox" else list(values) if values.ndim > 1 else values
    frame = pd.DataFrame(columns)
    if "annotated_category_id" in frame:
        frame["annotated_category_id"] = frame["annotated_category_id"].astype("Int64")
    return frame
