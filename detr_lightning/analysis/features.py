"""The features of objects at each layer: from boxes in the feature maps, and from queries in the decoder."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from detr_lightning.errors import SettingError, check_choice
from detr_lightning.store.store import EmbeddingStore

if TYPE_CHECKING:
    import pandas as pd

MAPS = {"backbone_features": "backbone", "encoder_output": "encoder"}
"""Keys that are maps of the image, and the names of their features."""


def object_features(
    store: EmbeddingStore, table: pd.DataFrame, keys: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """Return the features of each object at each layer.

    In a feature map, these are the means over the object's box (RoIAlign, He et al., 2017); in the decoder, the
    embedding of the object's query in each layer. `box` is the box itself, relative to the image: a baseline
    with only size and position.

    Args:
        store: The extraction.
        table: Rows of `objects`, or the found rows of `match`: `image_id`, `query` and the corners are read.
        keys: Any of `backbone_features`, `encoder_output`, `encoder_layers`, `decoder_output`; by default those that
            the store has.

    Returns:
        Matrices `[N, d]` in the order of the table: `box`, `backbone`, `encoder` or `encoder 1` to `encoder L`, and
        `decoder 1` to `decoder L`. A model with several feature maps has one matrix for each: `encoder level 0` etc.

    Raises:
        SettingError: The store lacks a key, or a row has no query since the object was missed.
    """
    known = (*MAPS, "encoder_layers", "decoder_output")
    if keys is None:
        keys = [key for key in known if key in store.embedding_keys]
    for key in keys:
        check_choice("keys", key, known)
    store.require(*keys)
    if table["query"].isna().any():
        raise SettingError("some objects have no query, since they were missed. Use table[table.found].")
    parts: defaultdict[str, list[np.ndarray]] = defaultdict(list)
    order = []
    for image_id, places in table.groupby("image_id", sort=False).indices.items():
        rows = table.iloc[places]
        order.append(places)
        entry = store.entry(image_id)
        size = torch.tensor([entry.width, entry.height] * 2)
        corners = torch.tensor(rows[["x1", "y1", "x2", "y2"]].to_numpy(np.float32)) / size  # [n, 4], relative
        parts["box"].append(corners.numpy())
        for key in keys:
            for name, features in _of_image(
                store, image_id, key, corners, torch.tensor(rows["query"].to_numpy(np.int64))
            ):
                parts[name].append(features.numpy())
    if not order:
        return {}
    back = np.concatenate(order).argsort()
    return {name: np.concatenate(matrices)[back] for name, matrices in parts.items()}


def _of_image(
    store: EmbeddingStore, image_id: int, key: str, corners: torch.Tensor, queries: torch.Tensor
) -> list[tuple[str, torch.Tensor]]:
    """Return the name and the features `[n, d]` of each layer of a key."""
    if key == "decoder_output":
        layers = store.load(image_id, key)[:, store.positions(image_id, queries)].float()  # [L, n, d]
        return [(f"decoder {number}", layer) for number, layer in enumerate(layers, start=1)]
    from torchvision.ops import roi_align

    features = store.entry(image_id).features
    levels = 1 if key == "backbone_features" or features is None else len(features.levels)
    found = []
    for level in range(levels):
        grid = store.feature_map(image_id, key, level).float()  # [d, H, W], or [L, d, H, W]
        height, width = grid.shape[-2:]
        boxes = corners * torch.tensor([width, height, width, height])
        by_name = {MAPS[key]: grid} if key in MAPS else {f"encoder {n}": layer for n, layer in enumerate(grid, start=1)}
        for name, layer in by_name.items():
            means = roi_align(layer[None], [boxes], output_size=1, aligned=True).flatten(1)
            found.append((name if levels == 1 else f"{name} level {level}", means))
    return found
