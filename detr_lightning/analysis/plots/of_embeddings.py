"""Pictures of the embeddings themselves: a map of objects, and the similarity of layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch

from detr_lightning.analysis.plots.style import INK, Figure, color_of, ink_on
from detr_lightning.analysis.vectors import embeddings_of, linear_cka
from detr_lightning.errors import MissingPackageError, SettingError, check_choice
from detr_lightning.store.store import EmbeddingStore

if TYPE_CHECKING:
    import pandas as pd

MARKERS = "os^D"


def embedding_map(table: pd.DataFrame, method: str = "pca", max_categories: int = 12, seed: int = 0) -> Figure:
    """Draw objects as points in the plane, close together if their embeddings are similar, colored by category.

    Args:
        table: Rows of `detr_lightning.analysis.objects.objects`, or the found rows of `match`.
        method: `pca`, or `umap`, which needs umap-learn.
        max_categories: How many of the most frequent categories get a color; the others are gray.
        seed: The random seed of `umap`.

    Raises:
        MissingPackageError: The method's package is not installed.
        SettingError: The method is unknown, or the table has no embeddings or fewer than three objects.
    """
    check_choice("method", method, ("pca", "umap"))
    vectors = embeddings_of(table)
    if len(vectors) < 3:
        raise SettingError(f"a map needs three objects or more, but the table has {len(vectors)}. Lower the threshold.")
    points, labels = _project(vectors, method, seed)
    figure = Figure(figsize=(8.4, 6), layout="constrained")
    axes = figure.subplots()
    counts = table["category_id"].value_counts()
    shown = counts.index[:max_categories]
    size = float(np.clip(9000 / len(points), 8, 60))
    category_ids = table["category_id"].to_numpy()
    rest = ~np.isin(category_ids, shown)
    if rest.any():
        name = f"{len(counts) - len(shown)} others  {rest.sum()}"
        axes.scatter(points[rest, 0], points[rest, 1], s=size, color="#c4c4c4", alpha=0.6, linewidth=0, label=name)
    for rank, category_id in enumerate(shown):
        chosen = category_ids == category_id
        name, color = table["category"].to_numpy()[chosen][0], color_of(int(category_id))
        x, y = points[chosen].T
        dots = axes.scatter(x, y, size, color=color, marker=MARKERS[rank % len(MARKERS)], alpha=0.85)
        dots.set(edgecolor="white", linewidth=0.4, label=f"{name}  {chosen.sum()}")
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(labels[0], color=INK)
    axes.set_ylabel(labels[1], color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    handles, names = axes.get_legend_handles_labels()
    if rest.any():  # Drawn first, named last.
        handles, names = handles[1:] + handles[:1], names[1:] + names[:1]
    figure.legend(handles, names, loc="outside right upper", frameon=False, markerscale=1.2, title="category, objects")
    return figure


def layer_similarity(
    store: EmbeddingStore, image_ids: Iterable[int] | None = None, measure: str = "cka", limit: int = 200
) -> Figure:
    """Draw how similar the decoder's layers are to each other.

    Args:
        store: A folder with `decoder_output`.
        image_ids: Which images; by default the first `limit`.
        measure: `cka` (linear centered kernel alignment, Kornblith et al. 2019), which compares how layers arrange the
            queries regardless of the axes, or `cosine`, the mean cosine of a query's embedding in two layers.
        limit: How many images to take by default.

    Raises:
        SettingError: The folder lacks `decoder_output`, or the measure is unknown.
        UnknownImageError: The store has no such image.
    """
    check_choice("measure", measure, ("cka", "cosine"))
    ids = store.image_ids[:limit] if image_ids is None else image_ids
    _, stacked = store.stack("decoder_output", ids)
    layers = stacked.transpose(0, 1).flatten(1, 2).float()  # [N, L, Q, d] -> [L, N * Q, d]
    if measure == "cosine":
        layers = torch.nn.functional.normalize(layers, dim=-1)
        grid = (torch.einsum("and,bnd->ab", layers, layers) / layers.shape[1]).numpy()
    else:
        grid = linear_cka(list(layers.numpy()), list(layers.numpy()))
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
            ink = ink_on(drawn.to_rgba(np.array([value]))[0, :3])
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=10)
    label = {"cka": "linear CKA", "cosine": "mean cosine"}[measure]
    figure.colorbar(drawn, ax=axes, label=label, shrink=0.9).outline.set_visible(False)
    return figure


def _project(vectors: np.ndarray, method: str, seed: int) -> tuple[np.ndarray, tuple[str, str]]:
    if method == "umap":
        try:
            from umap import UMAP
        except ImportError as error:
            raise MissingPackageError(
                "method='umap' needs umap-learn: pip install umap-learn. 'pca' works without it."
            ) from error
        neighbours = min(15, len(vectors) - 1)
        points = UMAP(n_neighbors=neighbours, metric="cosine", random_state=seed, n_jobs=1).fit_transform(vectors)
        return points, ("UMAP 1", "UMAP 2")
    try:
        from sklearn.decomposition import PCA
    except ImportError as error:
        raise MissingPackageError("method='pca' needs scikit-learn: pip install 'detr-lightning[analysis]'.") from error
    pca = PCA(2)
    points = pca.fit_transform(vectors)
    first, second = pca.explained_variance_ratio_
    return points, (f"first component, {first:.0%} of variance", f"second component, {second:.0%}")
