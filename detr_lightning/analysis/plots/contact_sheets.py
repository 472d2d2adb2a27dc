"""Contact sheets: in each line an object, followed by the objects that are most similar to it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from detr_lightning.analysis.pictures import open_picture, square_around, square_of
from detr_lightning.analysis.plots.style import INK, Figure, color_of, draw_box
from detr_lightning.analysis.vectors import embeddings_of, unit
from detr_lightning.errors import SettingError
from detr_lightning.store.store import EmbeddingStore

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


def neighbours(
    store: EmbeddingStore,
    table: pd.DataFrame,
    index: int | np.integer | Sequence[int] = 0,
    *,
    k: int = 6,
    image_dir: str | os.PathLike[str] | None = None,
    other_images: bool = True,
) -> Figure:
    """Draw objects, each followed by the `k` objects with the most similar embeddings (cosine).

    Args:
        store: The extraction, which records the images.
        table: Rows of `detr_lightning.analysis.objects.objects`, or the found rows of `match`.
        index: Which rows of the table to start from, by position; each gets a line of the picture.
        k: How many neighbours.
        image_dir: Where the images are now; by default where they were when they were extracted.
        other_images: Whether to leave out neighbours from the object's own image.

    Raises:
        FileNotFoundError: An image file does not exist.
        InputError: One has another size than at the extraction.
        SettingError: The table has no embeddings, no such row, or too few objects.
    """
    starts = np.atleast_1d(index).tolist()
    vectors = unit(embeddings_of(table))
    if outside := [start for start in starts if not -len(table) <= start < len(table)]:
        raise SettingError(f"there is no row {outside[0]}; the table has {len(table)} rows.")
    image_ids = table["image_id"].to_numpy()
    figure, panels = _panels(len(starts), k + 1)
    for line, start in zip(panels, starts, strict=True):
        similarity = vectors @ vectors[start]
        similarity[start] = -np.inf
        if other_images:
            similarity[image_ids == image_ids[start]] = -np.inf
        nearest = [other for other in np.argsort(-similarity)[:k] if np.isfinite(similarity[other])]
        if not nearest:
            raise SettingError(
                "the table has no other object to compare with; lower the threshold or take more images."
            )
        for axes, position in zip(line, [start, *nearest], strict=False):
            row = table.iloc[position]
            first = position == start
            text = row["category"] if first else f"{row['category']} {similarity[position]:.2f}"
            _draw(axes, open_picture(store, row["image_id"], image_dir), row, text, first)
    return _without_empty(figure)


def search_results(
    store: EmbeddingStore,
    queries: pd.DataFrame,
    found: pd.DataFrame,
    picture: np.ndarray,
    image_dir: str | os.PathLike[str] | None = None,
) -> Figure:
    """Draw a contact sheet: each query object, followed by the objects found and their cosines.

    Args:
        store: The extraction, which records the images of the found objects.
        queries: The objects of one image, as `query_objects` returns them.
        found: The result of `ObjectSearch.search` for their embeddings.
        picture: `[H, W, 3]`, the image of the query objects.
        image_dir: Where the images of the store are now; by default where they were when they were extracted.

    Raises:
        FileNotFoundError: An image file does not exist.
        InputError: One has another size than at the extraction.
    """
    image = Image.fromarray(picture)
    columns = int(found["rank"].max()) if len(found) else 0
    figure, panels = _panels(len(queries), columns + 1)
    for line, (_, query) in zip(panels, queries.iterrows(), strict=True):
        _draw(line[0], image, query, f"{query['category']} {query['score']:.2f}", first=True)
    for _, row in found.iterrows():
        title = f"{row['category']} {row['similarity']:.2f}"
        shown = open_picture(store, row["image_id"], image_dir)
        _draw(panels[row["search"], row["rank"]], shown, row, title, first=False)
    return _without_empty(figure)


def _panels(lines: int, columns: int) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(1.55 * columns, 1.85 * lines), layout="constrained")
    return figure, figure.subplots(lines, columns, squeeze=False)


def _without_empty(figure: Figure) -> Figure:
    for axes in figure.axes:
        if not axes.images:
            axes.set_axis_off()
    return figure


def _draw(axes: Axes, picture: Image.Image, row: pd.Series, title: str, first: bool) -> None:
    """Draw the square around an object, with its box; the first object of a line has a thick frame."""
    corners = row["x1"], row["y1"], row["x2"], row["y2"]
    left, top, side = square_of(picture.size, *corners)
    square = square_around(picture, *corners)
    axes.imshow(square, interpolation="lanczos", extent=(left, left + side, top + side, top))
    draw_box(axes, row, color_of(row["category_id"]))
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=9, color=INK, fontweight="bold" if first else "normal")
    for spine in axes.spines.values():
        spine.set(color=INK if first else "#bbbbbb", linewidth=3 if first else 0.8)
