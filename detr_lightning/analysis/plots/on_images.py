"""Pictures drawn on an image: detections, attention."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from detr_lightning.analysis.pictures import open_picture
from detr_lightning.analysis.plots.style import INK, Figure, color_of, draw_box, ink_on
from detr_lightning.store.store import EmbeddingStore

# Below style, which reports a missing matplotlib.
from matplotlib.patches import Rectangle  # isort: skip
from matplotlib.textpath import TextPath  # isort: skip
from detr_lightning.errors import SettingError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

WIDTH = 8
"""The width of a picture of one image, in inches."""


def detections(
    store: EmbeddingStore,
    image_id: int,
    image_dir: str | os.PathLike[str] | None = None,
    threshold: float = 0.7,
    label_scale: float = 1.0,
) -> Figure:
    """Draw an image's detections: boxes with category and score.

    Where boxes crowd, a label that would cover another one is left out.

    Args:
        store: A folder with `pred_logits` and `pred_boxes`.
        image_id: The image.
        image_dir: Where the images are now; by default where they were when they were extracted.
        threshold: The lowest score that is drawn.
        label_scale: Larger than 1 for labels that stay legible in a small picture.

    Raises:
        FileNotFoundError: The image file does not exist.
        InputError: It has another size than at the extraction.
        UnknownImageError: The store has no such image.
        SettingError: The folder lacks a key, or nothing reaches the threshold.
    """
    picture = _picture(store, image_id, image_dir)
    table = _objects(store, image_id, threshold)
    height, width = picture.shape[:2]
    figure = Figure(figsize=(WIDTH, WIDTH * height / width))
    axes = figure.add_axes((0, 0, 1, 1))
    _show(axes, picture)
    # Large boxes first, so that small ones stay on top.
    area = (table["x2"] - table["x1"]) * (table["y2"] - table["y1"])
    ordered = table.loc[area.sort_values(ascending=False).index]
    for row in ordered.itertuples():
        draw_box(axes, row, color_of(row.category_id))
    _label(axes, ordered, width, height, label_scale)
    return figure


def attention(
    store: EmbeddingStore,
    image_id: int,
    query: int | np.integer | Sequence[int] | None = None,
    *,
    layer: int = -1,
    image_dir: str | os.PathLike[str] | None = None,
    threshold: float = 0.7,
) -> Figure:
    """Draw the cross-attention of object queries on the image, averaged over heads, with each query's box.

    Args:
        store: A folder with `cross_attention`, `pred_logits` and `pred_boxes`.
        image_id: The image.
        query: Which queries; by default the four with the highest scores of at least `threshold`.
        layer: Which decoder layer; 0 is the first, -1 the last.
        image_dir: Where the images are now; by default where they were when they were extracted.
        threshold: The lowest score of the queries that are chosen by default.

    Raises:
        FileNotFoundError: The image file does not exist.
        InputError: It has another size than at the extraction.
        UnknownImageError: The store has no such image.
        SettingError: The folder lacks a key, the model has no cross-attention over the whole image, there is no such
            query, or nothing reaches the threshold.
    """
    from detr_lightning.analysis.reader import check_layer

    _check_dense(store)
    store.require("cross_attention", "pred_logits", "pred_boxes")
    picture = _picture(store, image_id, image_dir)
    if query is None:
        table = _objects(store, image_id, threshold)
        table = table.sort_values("score", ascending=False).head(4)
    else:
        queries = np.atleast_1d(query).tolist()
        table = _objects(store, image_id, store.min_score or 0.0).set_index("query", drop=False)
        if unknown := [number for number in queries if number not in table.index]:
            available = f"0 to {len(table) - 1}" if store.min_score is None else ", ".join(map(str, table.index))
            raise SettingError(f"there is no query {unknown[0]}; image {image_id} has {available}.")
        table = table.loc[queries]
    positions = store.positions(image_id, torch.tensor(table["query"].to_numpy()))
    layers = store.feature_map(image_id, "cross_attention")
    maps = layers[check_layer(layer, len(layers))][positions].float()  # [len(table), H, W]
    height, width = picture.shape[:2]
    columns = min(len(table), 2 if len(table) in (2, 4) else 3)
    rows = -(-len(table) // columns)
    figure = Figure(figsize=(4.6 * columns, (4.6 * height / width + 0.35) * rows), layout="constrained")
    gray = picture.mean(-1, keepdims=True).repeat(3, -1).astype(np.uint8)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, row, grid in zip(panels, table.itertuples(), maps, strict=False):
        weights = torch.nn.functional.interpolate(grid[None, None], (height, width), mode="bilinear")[0, 0]
        heat = (weights / weights.max().clamp(min=1e-12)).sqrt().numpy()  # The root shows weak attention too.
        _show(axes, gray)
        axes.imshow(heat, cmap="inferno", alpha=0.15 + 0.7 * heat, vmin=0, vmax=1)
        draw_box(axes, row, "black", linewidth=3)
        draw_box(axes, row, "white", linewidth=1.4)
        axes.set_title(f"query {row.query}: {row.category} {row.score:.2f}", fontsize=11, color=INK)
    for axes in panels:
        axes.set_axis_off()
    return figure


def _check_dense(store: EmbeddingStore) -> None:
    """Refuse a model without cross-attention over the whole image.

    Raises:
        SettingError: Its decoder attends to a few points of each feature map.
    """
    from detr_lightning.model.family import MODEL_TYPES

    family = store.metadata_file.settings.model.family
    if family in MODEL_TYPES and not MODEL_TYPES[family].dense:
        raise SettingError(
            f"{store.name} is from a {family}, whose decoder attends to a few points of each feature map: there is no "
            "cross-attention over the image to draw."
        )


def _objects(store: EmbeddingStore, image_id: int, threshold: float) -> pd.DataFrame:
    """Return the objects of an image.

    Raises:
        SettingError: Nothing reaches the threshold.
    """
    from detr_lightning.analysis.objects import frame_of
    from detr_lightning.analysis.reader import ObjectReader

    reader = ObjectReader(store, threshold, [image_id], key=None)
    table = frame_of(reader, progress=False)
    if table.empty:
        raise SettingError(reader.nothing_found())
    return table


def _picture(store: EmbeddingStore, image_id: int, image_dir: str | os.PathLike[str] | None) -> np.ndarray:
    return np.asarray(open_picture(store, image_id, image_dir))


def _show(axes: Axes, picture: np.ndarray) -> None:
    axes.imshow(picture, interpolation="lanczos")
    axes.set_axis_off()


def _label(axes: Axes, table: pd.DataFrame, width: int, height: int, scale: float) -> None:
    """Write each object's category and score at its box, where there is room for it."""
    line = 0.027 * scale * max(width, height)  # A label's height in pixels of the image.
    size = 0.68 * line * 72 * WIDTH / width  # The font size in points.
    placed: list[tuple[float, float, float, float]] = []
    # Small boxes first: in a large one there is more room for the label.
    for row in table.iloc[::-1].itertuples():
        text = f"{row.category} {row.score:.2f}"
        length = TextPath((0, 0), text, size=0.68 * line).get_extents().width + 0.6 * line
        right, below = row.x2 - length, row.y2 - line
        corners = [(row.x1, row.y1 - line), (row.x1, row.y1), (row.x1, row.y2), (row.x1, below), (right, row.y1 - line)]
        corners += [(right, row.y1), (right, row.y2), (right, below)]
        for corner in corners:
            x = min(max(corner[0], 0), width - length)
            y = min(max(corner[1], 0), height - line)
            spot = (x, y, x + length, y + line)
            if not any(_overlap(spot, other) for other in placed):
                placed.append(spot)
                color = color_of(row.category_id)
                axes.add_patch(Rectangle((x, y), length, line, facecolor=color, linewidth=0, zorder=3))
                center = (x + length / 2, y + line / 2)
                ink = ink_on(color)
                axes.text(*center, text, fontsize=size, color=ink, ha="center", va="center_baseline", zorder=4)
                break


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
