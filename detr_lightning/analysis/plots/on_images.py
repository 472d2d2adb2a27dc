"""Pictures drawn on the images: detections, attention, nearest neighbours."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from detr_lightning.analysis.pictures import open_picture
from detr_lightning.analysis.plots.style import INK, Figure, color_of, ink_on
from detr_lightning.analysis.vectors import embeddings_of, unit
from detr_lightning.store.store import EmbeddingStore

# Below style, which says what to install where matplotlib is missing.
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
        label_scale: Larger than 1 for labels that can be read in a small picture.

    Raises:
        FileNotFoundError: The image is not there.
        KeyError: The store holds no such image.
        ValueError: The folder lacks a key, or nothing reaches the threshold.
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
        _box(axes, row, color_of(row.category_id))
    _label(axes, ordered, width, height, label_scale)
    return figure


def attention(
    store: EmbeddingStore,
    image_id: int,
    query: int | Sequence[int] | None = None,
    *,
    layer: int = -1,
    image_dir: str | os.PathLike[str] | None = None,
    threshold: float = 0.7,
) -> Figure:
    """Draw where in the image object queries look: cross attention, averaged over heads, with each query's box.

    Args:
        store: A folder with `cross_attention`, `pred_logits` and `pred_boxes`.
        image_id: The image.
        query: Which queries; by default the four that score most, `threshold` or more.
        layer: Which decoder layer; 0 is the first, -1 the last.
        image_dir: Where the images are now; by default where they were when they were extracted.
        threshold: The lowest score of the queries that are chosen by default.

    Raises:
        FileNotFoundError: The image is not there.
        KeyError: The store holds no such image.
        ValueError: The folder lacks a key, there is no such query, or nothing reaches the threshold.
    """
    store.require("cross_attention", "pred_logits", "pred_boxes")
    picture = _picture(store, image_id, image_dir)
    if query is None:
        table = _objects(store, image_id, threshold)
        table = table.sort_values("score", ascending=False).head(4)
    else:
        queries = [query] if isinstance(query, int) else list(query)
        table = _objects(store, image_id, store.min_score or 0.0).set_index("query", drop=False)
        if unknown := [number for number in queries if number not in table.index]:
            there = f"0 to {len(table) - 1}" if store.min_score is None else ", ".join(map(str, table.index))
            raise SettingError(f"there is no query {unknown[0]}; image {image_id} has {there}.")
        table = table.loc[queries]
    positions = store.positions(image_id, torch.tensor(table["query"].to_numpy()))
    maps = store.feature_map(image_id, "cross_attention")[layer][positions].float()  # [len(table), H, W]
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
        _box(axes, row, "black", linewidth=3)
        _box(axes, row, "white", linewidth=1.4)
        axes.set_title(f"query {row.query}: {row.category} {row.score:.2f}", fontsize=11, color=INK)
    for axes in panels:
        axes.set_axis_off()
    return figure


def neighbours(
    store: EmbeddingStore,
    table: pd.DataFrame,
    index: int | Sequence[int] = 0,
    *,
    k: int = 6,
    image_dir: str | os.PathLike[str] | None = None,
    other_images: bool = True,
) -> Figure:
    """Draw objects and, right of each, the `k` objects with the most similar embeddings (cosine).

    Args:
        store: Where the images are known.
        table: Rows of `detr_lightning.analysis.objects.objects`, or the found ones of `match`.
        index: Which rows of the table to start from, by position; each gets a line of the picture.
        k: How many neighbours.
        image_dir: Where the images are now; by default where they were when they were extracted.
        other_images: Leave out neighbours from the object's own image.

    Raises:
        FileNotFoundError: An image is not there.
        ValueError: The table has no embeddings, no such row, or too few objects.
    """
    starts = [index] if isinstance(index, int) else list(index)
    vectors = unit(embeddings_of(table))
    if outside := [start for start in starts if not -len(table) <= start < len(table)]:
        raise SettingError(f"there is no row {outside[0]}; the table has {len(table)} rows.")
    image_ids = table["image_id"].to_numpy()
    figure = Figure(figsize=(1.55 * (k + 1), 1.85 * len(starts)), layout="constrained")
    panels = figure.subplots(len(starts), k + 1, squeeze=False)
    for line, start in enumerate(starts):
        similarity = vectors @ vectors[start]
        similarity[start] = -np.inf
        if other_images:
            similarity[image_ids == image_ids[start]] = -np.inf
        nearest = [other for other in np.argsort(-similarity)[:k] if np.isfinite(similarity[other])]
        if not nearest:
            raise SettingError(
                "the table has no other object to compare with; lower the threshold or take more images."
            )
        for axes, position in zip(panels[line], [start, *nearest], strict=False):
            row = table.iloc[position]
            first = position == start
            text = row["category"] if first else f"{row['category']} {similarity[position]:.2f}"
            _result(axes, _picture(store, row["image_id"], image_dir), row, text, first)
        for axes in panels[line][len(nearest) + 1 :]:
            axes.set_axis_off()
    return figure


def search_results(
    store: EmbeddingStore,
    queries: pd.DataFrame,
    found: pd.DataFrame,
    picture: np.ndarray,
    image_dir: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw a contact sheet: each object that was searched with and, right of it, what was found, with cosines.

    Args:
        store: Where the images of the found objects are known.
        queries: The objects of one image, such as `query_objects` returns them.
        found: What `ObjectSearch.search` returned for their embeddings.
        picture: `[H, W, 3]`, the image of the queries.
        image_dir: Where the images of the store are now; by default where they were when they were extracted.

    Raises:
        FileNotFoundError: An image is not there.
    """
    columns = int(found["rank"].max()) if len(found) else 0
    figure = Figure(figsize=(1.55 * (columns + 1), 1.85 * len(queries)), layout="constrained")
    panels = figure.subplots(len(queries), columns + 1, squeeze=False)
    for line, (_, query) in zip(panels, queries.iterrows(), strict=True):
        _result(line[0], picture, query, f"{query['category']} {query['score']:.2f}", first=True)
    for _, row in found.iterrows():
        title = f"{row['category']} {row['similarity']:.2f}"
        axes = panels[row["search"], row["rank"]]
        _result(axes, _picture(store, row["image_id"], image_dir), row, title, first=False)
    for axes in panels.flat:
        if not axes.images:
            axes.set_axis_off()
    return figure


def _result(axes: Axes, picture: np.ndarray, row: Any, title: str, first: bool) -> None:
    """Show an object as one of a line: the first, which the others are similar to, stands out."""
    _tile(axes, picture, row)
    axes.set_title(title, fontsize=9, color=INK, fontweight="bold" if first else "normal")
    for spine in axes.spines.values():
        spine.set(color=INK if first else "#bbbbbb", linewidth=3 if first else 0.8)


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


def _tile(axes: Axes, picture: np.ndarray, row: Any) -> None:
    """Show the square around an object, with its box; grey where the square leaves the image."""
    height, width = picture.shape[:2]
    x, y = (row["x1"] + row["x2"]) / 2, (row["y1"] + row["y2"]) / 2
    half = max(0.65 * max(row["x2"] - row["x1"], row["y2"] - row["y1"]), 8)
    # Moved rather than cut off at the image's border, as long as it fits.
    x = min(max(x, half), width - half) if 2 * half <= width else width / 2
    y = min(max(y, half), height - half) if 2 * half <= height else height / 2
    top, left = max(int(y - half), 0), max(int(x - half), 0)
    part = picture[top : int(y + half) + 1, left : int(x + half) + 1]
    extent = (left - 0.5, left + part.shape[1] - 0.5, top + part.shape[0] - 0.5, top - 0.5)
    axes.imshow(part, interpolation="lanczos", extent=extent)
    _box(axes, row, color_of(row["category_id"]))
    axes.set(xlim=(x - half, x + half), ylim=(y + half, y - half), xticks=[], yticks=[], facecolor="#e8e8e8")


def _show(axes: Axes, picture: np.ndarray) -> None:
    axes.imshow(picture, interpolation="lanczos")
    axes.set_axis_off()


def _box(axes: Axes, row: Any, color: Any, linewidth: float = 2.0) -> None:
    corner, extent = (row.x1, row.y1), (row.x2 - row.x1, row.y2 - row.y1)
    axes.add_patch(Rectangle(corner, *extent, fill=False, edgecolor=color, linewidth=linewidth))


def _label(axes: Axes, table: pd.DataFrame, width: int, height: int, scale: float) -> None:
    """Write each object's category and score at its box, where there is room for it."""
    line = 0.027 * scale * max(width, height)  # A label's height in pixels of the image.
    size = 0.68 * line * 72 * WIDTH / width  # The font's, in points.
    placed: list[tuple[float, float, float, float]] = []
    # The best spots go to the small boxes: in a large one there is more room.
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
