"""Pictures of what an extraction holds. Each function returns a matplotlib `Figure`, which notebooks show and `savefig` saves.

A category has the same colour in every picture. No display is needed.
"""

from __future__ import annotations

import colorsys
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from detr_lightning.embeddings import one_of
from detr_lightning.store.reading import EmbeddingStore

try:
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
except ImportError as missing:
    raise ImportError("Pictures need matplotlib: pip install 'detr-lightning[analysis]'.") from missing

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

INK = "#222222"
_CROP_MARGIN = 0.15


def color_of(category_id: int) -> tuple[float, float, float]:
    """Return a category's colour: far from those of the ids next to it, and the same in every picture."""
    hue = (0.58 + 0.61803399 * category_id) % 1.0
    lightness, saturation = ((0.46, 0.78), (0.60, 0.88), (0.34, 0.62))[category_id % 3]
    return colorsys.hls_to_rgb(hue, lightness, saturation)


def detections(
    store: EmbeddingStore,
    image_id: int,
    image_dir: str | os.PathLike[str] | None = None,
    threshold: float = 0.7,
) -> Figure:
    """Draw an image's detections: boxes with category and score.

    Args:
        store: A folder with `pred_logits` and `pred_boxes`.
        image_id: The image.
        image_dir: Where the images are now; by default where they were when they were extracted.
        threshold: The lowest score that is drawn.

    Raises:
        FileNotFoundError: The image is not there.
        KeyError: The store holds no such image.
        ValueError: The folder lacks a key, or nothing reaches the threshold.
    """
    from detr_lightning.objects import objects

    picture = _picture(store, image_id, image_dir)
    table = objects(store, threshold, image_ids=[image_id], key=None)
    height, width = picture.shape[:2]
    figure = Figure(figsize=(8, 8 * height / width))
    axes = figure.add_axes((0, 0, 1, 1))
    _show(axes, picture)
    # Large boxes first, so that small ones and their labels stay on top.
    area = (table["x2"] - table["x1"]) * (table["y2"] - table["y1"])
    ordered = table.loc[area.sort_values(ascending=False).index]
    for row in ordered.itertuples():
        _box(axes, row, color_of(row.category_id))
    _place_labels(axes, ordered, width, height)
    return figure


def attention(
    store: EmbeddingStore,
    image_id: int,
    query: int | Sequence[int] | None = None,
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
    from detr_lightning.objects import objects

    store.require("cross_attention", "pred_logits", "pred_boxes")
    picture = _picture(store, image_id, image_dir)
    if query is None:
        table = objects(store, threshold, image_ids=[image_id], key=None)
        table = table.sort_values("score", ascending=False).head(4)
    else:
        queries = [query] if isinstance(query, int) else list(query)
        table = objects(store, 0.0, image_ids=[image_id], key=None).set_index("query", drop=False)
        if unknown := [number for number in queries if number not in table.index]:
            raise ValueError(f"there is no query {unknown[0]}; image {image_id} has 0 to {len(table) - 1}.")
        table = table.loc[queries]
    maps = store.feature_map(image_id, "cross_attention")[layer].float()  # [Q, H, W]
    height, width = picture.shape[:2]
    columns = min(len(table), 2 if len(table) in (2, 4) else 3)
    rows = -(-len(table) // columns)
    figure = Figure(figsize=(4.6 * columns, (4.6 * height / width + 0.4) * rows), layout="constrained")
    gray = picture.mean(-1, keepdims=True).repeat(3, -1).astype(np.uint8)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes, row in zip(panels, table.itertuples(), strict=False):
        heat = torch.nn.functional.interpolate(maps[None, None, row.query], (height, width), mode="bilinear")[0, 0]
        heat = (heat / heat.max().clamp(min=1e-12)).sqrt().numpy()  # The root shows weak attention too.
        _show(axes, gray)
        axes.imshow(heat, cmap="inferno", alpha=0.15 + 0.7 * heat, vmin=0, vmax=1)
        _box(axes, row, "white", linewidth=1.6)
        axes.set_title(f"query {row.query}: {row.category} {row.score:.2f}", fontsize=11, color=INK)
    for axes in list(panels):
        axes.set_axis_off()
    return figure


def neighbours(
    store: EmbeddingStore,
    table: pd.DataFrame,
    index: int | Sequence[int] = 0,
    k: int = 6,
    image_dir: str | os.PathLike[str] | None = None,
    other_images: bool = True,
) -> Figure:
    """Draw objects and, right of each, the `k` objects with the most similar embeddings (cosine).

    Args:
        store: Where the images are known.
        table: Rows of `detr_lightning.objects.objects`, or the found ones of `match`.
        index: Which rows of the table to start from, by position; each gets a line of the picture.
        k: How many neighbours.
        image_dir: Where the images are now; by default where they were when they were extracted.
        other_images: Leave out neighbours from the object's own image.

    Raises:
        FileNotFoundError: An image is not there.
        ValueError: The table has no embeddings, no such row, or too few objects.
    """
    starts = [index] if isinstance(index, int) else list(index)
    vectors = _unit(_embeddings(table))
    if outside := [start for start in starts if not -len(table) <= start < len(table)]:
        raise ValueError(f"there is no row {outside[0]}; the table has {len(table)} rows.")
    image_ids = table["image_id"].to_numpy()
    figure = Figure(figsize=(1.55 * (k + 1), 1.95 * len(starts)), layout="constrained")
    panels = figure.subplots(len(starts), k + 1, squeeze=False)
    for line, start in enumerate(starts):
        similarity = vectors @ vectors[start]
        similarity[start] = -np.inf
        if other_images:
            similarity[image_ids == image_ids[start]] = -np.inf
        nearest = [other for other in np.argsort(-similarity)[:k] if np.isfinite(similarity[other])]
        if not nearest:
            raise ValueError("the table has no other object to compare with; lower the threshold or take more images.")
        for axes, position in zip(panels[line], [start, *nearest], strict=False):
            row = table.iloc[position]
            _show(axes, _crop(_picture(store, row["image_id"], image_dir), row))
            first = position == start
            axes.set_title(
                f"{row['category']}" if first else f"{row['category']} {similarity[position]:.2f}",
                fontsize=9,
                color=INK,
                fontweight="bold" if first else "normal",
            )
            axes.set_axis_on()
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set(color=color_of(row["category_id"]), linewidth=4.5 if first else 2)
        for axes in panels[line][len(nearest) + 1 :]:
            axes.set_axis_off()
    return figure


def embedding_map(table: pd.DataFrame, method: str = "pca", max_categories: int = 12, seed: int = 0) -> Figure:
    """Draw objects as points in the plane, near where their embeddings are similar, coloured by category.

    Args:
        table: Rows of `detr_lightning.objects.objects`, or the found ones of `match`.
        method: `pca`, or `umap` where umap-learn is installed.
        max_categories: The most frequent categories get a colour; the others are grey.
        seed: For `umap`.

    Raises:
        ImportError: The method's package is not installed.
        ValueError: The table has no embeddings, or fewer than three objects.
    """
    one_of("method", method, ("pca", "umap"))
    vectors = _embeddings(table)
    if len(vectors) < 3:
        raise ValueError(f"a map needs three objects or more, the table has {len(vectors)}. Lower the threshold.")
    points, labels = _project(vectors, method, seed)
    figure = Figure(figsize=(8.4, 6), layout="constrained")
    axes = figure.subplots()
    counts = table["category_id"].value_counts()
    shown = counts.index[:max_categories]
    size = float(np.clip(9000 / len(points), 8, 60))
    category_ids = table["category_id"].to_numpy()
    rest = ~np.isin(category_ids, shown)
    if rest.any():
        style = {"s": size, "color": "#c4c4c4", "alpha": 0.6, "linewidth": 0}
        axes.scatter(*points[rest].T, label=f"{len(counts) - len(shown)} others  {rest.sum()}", **style)
    for category_id in shown:
        chosen = category_ids == category_id
        name = table["category"].to_numpy()[chosen][0]
        axes.scatter(
            *points[chosen].T,
            s=size,
            color=color_of(int(category_id)),
            alpha=0.85,
            edgecolor="white",
            linewidth=0.4,
            label=f"{name}  {chosen.sum()}",
        )
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(labels[0], color=INK)
    axes.set_ylabel(labels[1], color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, markerscale=1.2, title="category, objects")
    return figure


def layer_similarity(
    store: EmbeddingStore, image_ids: Iterable[int] | None = None, measure: str = "cka", limit: int = 200
) -> Figure:
    """Draw how similar the decoder's layers are to each other.

    Args:
        store: A folder with `decoder_output`.
        image_ids: Which images; by default the first `limit`.
        measure: `cka` (linear centered kernel alignment, Kornblith et al. 2019), which compares how layers arrange the queries
            whatever their axes, or `cosine`, the mean cosine of a query's embedding in two layers.
        limit: How many images are enough.

    Raises:
        ValueError: The folder lacks `decoder_output`.
    """
    one_of("measure", measure, ("cka", "cosine"))
    ids = store.image_ids[:limit] if image_ids is None else image_ids
    _, stacked = store.stack("decoder_output", ids)
    layers = stacked.transpose(0, 1).flatten(1, 2).float()  # [N, L, Q, d] -> [L, N * Q, d]
    if measure == "cosine":
        layers = torch.nn.functional.normalize(layers, dim=-1)
        similarity = torch.einsum("and,bnd->ab", layers, layers) / layers.shape[1]
    else:
        layers = layers - layers.mean(1, keepdim=True)
        cross = torch.einsum("and,bne->abde", layers, layers).square().sum((2, 3))  # [L, L]
        similarity = cross / torch.sqrt(cross.diagonal()[:, None] * cross.diagonal()[None, :])
    grid = similarity.numpy()
    number = len(grid)
    figure = Figure(figsize=(1.6 + 0.75 * number, 0.8 + 0.75 * number), layout="constrained")
    axes = figure.subplots()
    low = min(0.0, float(grid.min()))
    drawn = axes.imshow(grid, cmap="viridis", vmin=low, vmax=1)
    names = [str(layer + 1) for layer in range(number)]
    axes.set_xticks(range(number), names)
    axes.set_yticks(range(number), names)
    axes.set_xlabel("decoder layer", color=INK)
    axes.set_ylabel("decoder layer", color=INK)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for row in range(number):
        for column in range(number):
            value = float(grid[row, column])
            ink = _ink_on(drawn.cmap(drawn.norm(value))[:3])
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=10)
    label = {"cka": "linear CKA", "cosine": "mean cosine"}[measure]
    figure.colorbar(drawn, ax=axes, label=label, shrink=0.9).outline.set_visible(False)
    return figure


def _project(vectors: np.ndarray, method: str, seed: int) -> tuple[np.ndarray, tuple[str, str]]:
    if method == "umap":
        try:
            from umap import UMAP
        except ImportError as error:
            raise ImportError("method='umap' needs umap-learn: pip install umap-learn. 'pca' does without.") from error
        neighbours = min(15, len(vectors) - 1)
        return UMAP(n_neighbors=neighbours, metric="cosine", random_state=seed, n_jobs=1).fit_transform(vectors), (
            "UMAP 1",
            "UMAP 2",
        )
    try:
        from sklearn.decomposition import PCA
    except ImportError as error:
        raise ImportError("method='pca' needs scikit-learn: pip install 'detr-lightning[analysis]'.") from error
    pca = PCA(2)
    points = pca.fit_transform(vectors)
    first, second = pca.explained_variance_ratio_
    return points, (f"first component, {first:.0%} of variance", f"second component, {second:.0%}")


def _picture(store: EmbeddingStore, image_id: int, image_dir: str | os.PathLike[str] | None) -> np.ndarray:
    from PIL import Image

    with Image.open(store.image_path(int(image_id), image_dir)) as image:
        return np.asarray(image.convert("RGB"))


def _embeddings(table: pd.DataFrame) -> np.ndarray:
    """Return a table's embeddings as a matrix `[N, d]`."""
    if "embedding" not in table or not len(table):
        raise ValueError("the table has no embeddings. Make it with objects(store), or match, and key not None.")
    if table["embedding"].isna().any():
        raise ValueError("some objects have no embedding: they were missed. Take table[table.found].")
    return np.stack(list(table["embedding"]))


def _unit(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=1e-12))


def _crop(picture: np.ndarray, row: Any) -> np.ndarray:
    """Cut an object out, with a little of what is around it."""
    height, width = picture.shape[:2]
    x_margin, y_margin = (_CROP_MARGIN * (row[f"{axis}2"] - row[f"{axis}1"]) for axis in "xy")
    left, top = (int(max(0, row["x1"] - x_margin)), int(max(0, row["y1"] - y_margin)))
    right, bottom = (int(min(width, row["x2"] + x_margin + 1)), int(min(height, row["y2"] + y_margin + 1)))
    return picture[min(top, height - 1) : max(bottom, top + 1), min(left, width - 1) : max(right, left + 1)]


def _show(axes: Axes, picture: np.ndarray) -> None:
    axes.imshow(picture, interpolation="lanczos")
    axes.set_axis_off()


def _box(axes: Axes, row: Any, color: Any, linewidth: float = 2.0) -> None:
    corner, extent = (row.x1, row.y1), (row.x2 - row.x1, row.y2 - row.y1)
    axes.add_patch(Rectangle(corner, *extent, fill=False, edgecolor=color, linewidth=linewidth))


def _place_labels(axes: Axes, table: pd.DataFrame, width: int, height: int) -> None:
    """Write each object's category and score at a corner of its box, where no other label is in the way."""
    line = 0.028 * max(width, height)  # A label's height in pixels of the image.
    placed: list[tuple[float, float, float, float]] = []
    for row in table.itertuples():
        text = f"{row.category} {row.score:.2f}"
        length = 0.56 * line * len(text)
        corners = [(row.x1, row.y1 - line), (row.x1, row.y1), (row.x2 - length, row.y1), (row.x1, row.y2 - line), (row.x1, row.y2)]
        spots = [(min(max(x, 0), width - length), min(max(y, 0), height - line)) for x, y in corners]
        spots += [(spots[1][0], min(spots[1][1] + step * line, height - line)) for step in range(1, 6)]

        def free(spot: tuple[float, float]) -> bool:
            x, y = spot
            return all(x >= x2 or x + length <= x1 or y >= y2 or y + line <= y1 for x1, y1, x2, y2 in placed)

        x, y = next(filter(free, spots), spots[0])
        placed.append((x, y, x + length, y + line))
        color = color_of(row.category_id)
        axes.add_patch(Rectangle((x, y), length, line, color=color, linewidth=0))
        size = 0.66 * line * 72 * 8 / width  # Pixels of the image -> points.
        axes.text(x + length / 2, y + line / 2, text, fontsize=size, color=_ink_on(color), ha="center", va="center_baseline")


def _ink_on(color: Sequence[float]) -> str:
    """Return the ink that is read best on a colour: by its relative luminance."""
    red, green, blue = color
    return INK if 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 > 0.25 else "white"
