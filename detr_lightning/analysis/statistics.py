"""Statistics of objects, grouped by image: bootstrap intervals, probes, and precision of neighbours.

Objects in one image are not independent, so whole images are resampled or held out, and an object's neighbours are
searched in other images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from detr_lightning.analysis.vectors import embeddings_of, unit
from detr_lightning.errors import MissingPackageError, SettingError

try:
    import pandas as pd
except ImportError as missing:
    raise MissingPackageError("Statistics need pandas: pip install 'detr-lightning[analysis]'.") from missing

_CELLS = 10_000_000
"""The most numbers in a block of draws or of similarities."""


class GroupMeans(NamedTuple):
    """The mean of a column in each group, with bootstrap intervals over images."""

    summary: pd.DataFrame
    """For each group `objects`, `images`, `mean`, and the interval `low` to `high`; no interval (NaN) for a group in
    a single image, since the variance between images cannot be estimated."""
    draws: pd.DataFrame
    """`[draws, groups]`: the mean in each draw of images. The draws are the same for all groups."""
    level: float

    def difference(self, one: Any, other: Any) -> tuple[float, float, float]:
        """Return how much larger the mean of `one` is than that of `other`, and the interval of this difference.

        Two groups may differ although their intervals overlap: all groups share the draws.
        """
        gap = self.draws[one] - self.draws[other]
        low, high = _interval(gap, self.level)
        if self.summary.loc[[one, other], "images"].min() < 2:
            low = high = np.nan
        return float(self.summary["mean"][one] - self.summary["mean"][other]), float(low), float(high)


def by_group(
    table: pd.DataFrame, group: str, column: str, draws: int = 2000, level: float = 0.95, seed: int = 0
) -> GroupMeans:
    """Return each group's mean of a column, with a bootstrap interval over whole images.

    Args:
        table: Rows with `image_id`, `group` and `column`, such as those of `match`. Rows without a group are left out.
        group: The column of the groups.
        column: The column to average, such as `found`.
        draws: How many samples of images are drawn, with replacement.
        level: The share of the draws that an interval covers.
        seed: The random seed of the draws.

    Raises:
        SettingError: The table lacks a column, or a setting is out of range.
    """
    if absent := [name for name in ("image_id", group, column) if name not in table]:
        raise SettingError(f"the table has no column {absent[0]!r}, only {', '.join(map(str, table))}.")
    if not 0 < level < 1 or draws < 1:
        raise SettingError(f"level is {level} and draws is {draws}; level must be between 0 and 1, draws at least 1.")
    table = table[table[column].notna()]
    values = table[column].astype(float).groupby([table["image_id"], table[group]], observed=True)
    cells = values.agg(["sum", "size"]).unstack(fill_value=0)
    if cells.empty:
        summary = pd.DataFrame({"objects": [], "images": [], "mean": [], "low": [], "high": []})
        return GroupMeans(summary, pd.DataFrame(index=range(draws)), level)
    images = len(cells)
    random = np.random.default_rng(seed)
    block = max(_CELLS // images, 1)
    parts = []
    for start in range(0, draws, block):
        times = random.multinomial(images, np.full(images, 1 / images), min(block, draws - start))  # [draws, images]
        sizes = times @ cells["size"].to_numpy(float)
        parts.append(times @ cells["sum"].to_numpy(float) / np.where(sizes > 0, sizes, np.nan))
    means = pd.DataFrame(np.concatenate(parts), columns=cells["size"].columns)
    size, spread = cells["size"].sum(), (cells["size"] > 0).sum()
    low, high = (bound.where(spread > 1) for bound in _interval(means, level))
    summary = {"objects": size, "images": spread, "mean": cells["sum"].sum() / size, "low": low, "high": high}
    return GroupMeans(pd.DataFrame(summary), means, level)


def _interval(draws: Any, level: float) -> tuple[Any, Any]:
    return draws.quantile((1 - level) / 2), draws.quantile((1 + level) / 2)


def probe(
    features: Mapping[str, np.ndarray],
    labels: Sequence[Any] | pd.Series[Any],
    image_ids: Sequence[int] | pd.Series[int],
    folds: int = 5,
    strength: float = 0.1,
) -> pd.DataFrame:
    """Return how well a linear classifier predicts the labels from each kind of features, on held-out images.

    Features are standardized and classified by logistic regression, cross-validated with whole images in each fold.

    Args:
        features: `[N, d]` by name, as `object_features` returns them.
        labels: `[N]`.
        image_ids: `[N]`.
        folds: How many parts the images are split into.
        strength: The inverse of the regularization, scikit-learn's `C`.

    Returns:
        The accuracy in each fold (rows) for each kind of features (columns).

    Raises:
        MissingPackageError: scikit-learn is not installed.
        SettingError: There are fewer images than folds, fewer than two folds or labels, or lengths differ.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GroupKFold, cross_val_score
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise MissingPackageError("Probes need scikit-learn: pip install 'detr-lightning[analysis]'.") from error
    names, groups = np.asarray(labels), np.asarray(image_ids)
    images, kinds = len(np.unique(groups)), len(np.unique(names))
    if folds < 2:
        raise SettingError(f"folds is {folds}, but must be at least 2: one for testing, the others for training.")
    if images < folds:
        raise SettingError(f"{images} images cannot be split into {folds} folds. Take more images, or fewer folds.")
    if kinds < 2:
        raise SettingError(
            f"a probe needs two labels or more, but has {kinds}. Take more images, or a lower threshold."
        )
    for name, matrix in features.items():
        if len(matrix) != len(names) or len(groups) != len(names):
            raise SettingError(f"{name} has {len(matrix)} rows, for {len(names)} labels and {len(groups)} image ids.")
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))
    scores = {
        name: cross_val_score(classifier, matrix, names, groups=groups, cv=GroupKFold(folds), error_score="raise")
        for name, matrix in features.items()
    }
    return pd.DataFrame(scores)


def precision_at_k(
    table: pd.DataFrame, ks: Sequence[int] = (1, 5, 10), label: str = "category_id", other_images: bool = True
) -> pd.DataFrame:
    """Return, for each object, the share of its nearest neighbours by cosine that have its label.

    Args:
        table: Rows with `embedding`, `image_id` and the label. Rows without a label are no neighbours.
        ks: How many neighbours. If there are fewer, all of them count.
        label: The column to compare.
        other_images: Leave out neighbours from the object's own image, which would be too easy.

    Returns:
        A column `precision at k` for each `k`, with the table's index; NaN for an object without a label or without any
        neighbour.

    Raises:
        SettingError: The table has no embeddings, or a `k` is below 1.
    """
    if not ks or min(ks) < 1:
        raise SettingError(f"ks is {list(ks)}, but must be numbers of neighbours, such as 1, 5, 10.")
    columns = [f"precision at {k}" for k in ks]
    if table.empty:
        return pd.DataFrame({name: pd.Series(dtype=float) for name in columns})
    vectors = torch.from_numpy(unit(embeddings_of(table)))
    image_ids = torch.tensor(table["image_id"].to_numpy(np.int64))
    labels = torch.from_numpy(pd.factorize(table[label])[0])
    unlabelled = labels < 0
    most = min(max(ks), len(table))
    shares = []
    for rows in torch.arange(len(table)).split(max(_CELLS // len(table), 1)):
        similarity = vectors[rows] @ vectors.T
        similarity[torch.arange(len(rows)), rows] = -torch.inf
        if other_images:
            similarity[image_ids[rows, None] == image_ids] = -torch.inf
        similarity[unlabelled[rows, None] | unlabelled] = -torch.inf
        best, nearest = similarity.topk(most)  # [rows, most]
        valid = best.isfinite()
        hits = ((labels[nearest] == labels[rows, None]) & valid).cumsum(1)
        known = valid.cumsum(1)
        places = torch.tensor([min(k, most) - 1 for k in ks])
        shares.append(hits[:, places] / known[:, places])
    return pd.DataFrame(torch.cat(shares).double().numpy(), columns=columns, index=table.index)


def typicality(table: pd.DataFrame, label: str = "category_id") -> pd.Series[float]:
    """Return the cosine between each object's embedding and the mean direction of all others with its label.

    A group that the model represents less well tends to have lower values, even where its objects are found.

    Args:
        table: Rows with `embedding` and the label.
        label: The column of the labels.

    Returns:
        A number for each row; NaN if it has no label, or no other object has the same.

    Raises:
        SettingError: The table has no embeddings.
    """
    if table.empty:
        return pd.Series(index=table.index, dtype=float)
    vectors = unit(embeddings_of(table)).astype(np.float64)
    codes, names = pd.factorize(table[label], use_na_sentinel=False)
    sums = np.zeros((len(names), vectors.shape[1]))
    np.add.at(sums, codes, vectors)
    cosine = (vectors * unit(sums[codes] - vectors)).sum(1)
    shared = (np.bincount(codes)[codes] > 1) & table[label].notna()
    return pd.Series(np.where(shared, cosine, np.nan), index=table.index)
