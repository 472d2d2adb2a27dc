"""A table of what was detected: a row for each object, with its embedding."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from detr_lightning.errors import MissingPackageError, SettingError

try:
    import pandas as pd
except ImportError as missing:
    raise MissingPackageError("Tables of objects need pandas: pip install 'detr-lightning[analysis]'.") from missing

from detr_lightning.detections import detect
from detr_lightning.format.files import replacing
from detr_lightning.parallel import track
from detr_lightning.store.store import EmbeddingStore

CORNERS = ["x1", "y1", "x2", "y2"]


def objects(
    store: EmbeddingStore,
    threshold: float = 0.7,
    *,
    image_ids: Iterable[int] | None = None,
    key: str | None = "query_embeddings",
    layer: int = -1,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Return a row for each object query that scores `threshold` or more.

    Args:
        store: A folder with `pred_logits` and `pred_boxes`.
        threshold: From 0 to 1; 0 gives all queries, "no object" or not.
        image_ids: Which images; by default all.
        key: Where `embedding` comes from: `query_embeddings`, `decoder_output`, or None for a table without embeddings.
        layer: With `decoder_output`, which decoder layer; 0 is the first, -1 the last.
        progress: Show a progress bar; by default for more than 1000 images or after two seconds.

    Returns:
        The columns `image_id`, `query` (0 to 99), `category_id`, `category`, `score`, the corners `x1`, `y1`, `x2`,
        `y2` and COCO's `bbox` `[x, y, width, height]` in pixels of the original image, and `embedding`, an array for
        each row: `np.stack(table.embedding)` is the matrix. By image, then by query.

    Raises:
        KeyError: The store holds no such image.
        ValueError: The folder lacks a key, the threshold is no probability, or nothing reaches it.
    """
    if not 0 <= threshold <= 1:
        raise SettingError(f"threshold is {threshold}; a score is a probability, from 0 to 1.")
    if key not in (None, "query_embeddings", "decoder_output"):
        raise SettingError(f"key is {key!r}; an object has query_embeddings, decoder_output, or None.")
    store.require("pred_logits", "pred_boxes", *([key] if key else []))
    names = store.categories
    ids = store.image_ids if image_ids is None else list(image_ids)
    rows: list[dict[str, Any]] = []
    best, best_image = -1.0, None
    for image_id in track(ids, len(ids), "Reading objects", progress):
        entry = store.entry(image_id)
        found = detect(store.load(image_id, "pred_logits"), store.load(image_id, "pred_boxes"), entry.size)
        top = found.scores.max().item()
        if top > best:
            best, best_image = top, image_id
        if top < threshold:
            continue
        embedding = None
        if key is not None:
            tensor = store.load(image_id, key)
            embedding = (tensor[layer] if key == "decoder_output" else tensor).float().numpy()  # [Q, d]
        for query in (found.scores >= threshold).nonzero().flatten().tolist():
            x1, y1, x2, y2 = found.boxes_xyxy[query].tolist()
            category_id = int(found.labels[query])
            row = {
                "image_id": int(image_id),
                "query": query,
                "category_id": category_id,
                "category": names.get(category_id, str(category_id)),
                "score": found.scores[query].item(),
                **{"x1": x1, "y1": y1, "x2": x2, "y2": y2},
                "bbox": [x1, y1, x2 - x1, y2 - y1],
            }
            if embedding is not None:
                row["embedding"] = embedding[query].copy()
            rows.append(row)
    if not rows:
        if not ids:
            raise SettingError(f"No image of {store.folder} was chosen. It holds {len(store)} images.")
        raise SettingError(
            f"No query of {len(ids)} images scores {threshold} or more; the best is {best:.3f}, in image {best_image}. "
            "Lower the threshold."
        )
    return pd.DataFrame(rows)


def write(table: pd.DataFrame, path: str | os.PathLike[str]) -> Path:
    """Write a table of `objects` or `match` to a Parquet file, whole or not at all; `pandas.read_parquet` reads it.

    Raises:
        OSError: The file cannot be written.
    """
    path = Path(path).expanduser()
    plain = table.copy()
    for column in plain.columns:
        if plain[column].map(lambda value: isinstance(value, dict)).any():
            plain[column] = plain[column].map(lambda value: None if value is None else json.dumps(value))
    with replacing(path) as file:
        plain.to_parquet(file, index=False)
    return path
