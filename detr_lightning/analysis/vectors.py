"""The embeddings of a table as a matrix, and the similarity of two matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from detr_lightning.errors import SettingError

if TYPE_CHECKING:
    import pandas as pd


def embeddings_of(table: pd.DataFrame) -> np.ndarray:
    """Return a table's embeddings as a matrix `[N, d]`.

    Raises:
        SettingError: The table has no embeddings, or some of its objects have none.
    """
    if "embedding" not in table or not len(table):
        raise SettingError("the table has no embeddings. Make it with objects or match, and do not set key to None.")
    if table["embedding"].isna().any():
        raise SettingError("some objects have no embedding, since they were missed. Use table[table.found].")
    return np.stack(list(table["embedding"]))


def unit(vectors: np.ndarray) -> np.ndarray:
    """Return vectors `[..., d]` scaled to length 1, so that their dot products are cosines."""
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True).clip(min=1e-12))


def linear_cka(one: Sequence[np.ndarray], other: Sequence[np.ndarray], debiased: bool = False) -> np.ndarray:
    """Return the linear centered kernel alignment of each matrix of one list with each of the other.

    It compares two representations of the same rows: 1 if they differ only by a rotation and a scale (Kornblith et
    al., 2019).

    Args:
        one: Matrices `[N, d]`; `d` may differ.
        other: The same rows in other representations.
        debiased: Use the estimator that does not grow with `d / N` (Nguyen et al., 2021). It needs memory for `[N, N]`
            and can be slightly negative. Without it, matrices with fewer rows than columns look alike.

    Returns:
        `[len(one), len(other)]`.

    Raises:
        SettingError: The numbers of rows differ, or there are too few rows.
    """
    rows = {len(matrix) for matrix in (*one, *other)}
    fewest = 4 if debiased else 2
    if len(rows) != 1 or min(rows) < fewest:
        raise SettingError(f"CKA needs matrices of equally many rows, at least {fewest}; these have {sorted(rows)}.")
    product = _debiased_product if debiased else _product
    first, second = ([_prepared(matrix, debiased) for matrix in matrices] for matrices in (one, other))
    norms = [np.array([product(matrix, matrix) for matrix in matrices]) for matrices in (first, second)]
    cross = np.array([[product(a, b) for b in second] for a in first])
    scale = np.sqrt(np.maximum(norms[0][:, None] * norms[1][None], 0))
    return np.asarray(np.divide(cross, scale, out=np.full_like(cross, np.nan), where=scale > 0))


def _prepared(matrix: np.ndarray, debiased: bool) -> np.ndarray:
    centered = np.asarray(matrix - np.mean(matrix, 0, dtype=np.float64))
    if not debiased:
        return centered
    gram = centered @ centered.T  # [N, N]
    np.fill_diagonal(gram, 0)
    return np.asarray(gram)


def _product(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.square(one.T @ other).sum())


def _debiased_product(one: np.ndarray, other: np.ndarray) -> float:
    """Return the unbiased HSIC of two Gram matrices with empty diagonals (Song et al., 2012, equation 5)."""
    n = len(one)
    sums = one.sum(0), other.sum(0)
    whole = sums[0].sum() * sums[1].sum() / ((n - 1) * (n - 2))
    return float(((one * other).sum() + whole - 2 / (n - 2) * (sums[0] @ sums[1])) / (n * (n - 3)))
