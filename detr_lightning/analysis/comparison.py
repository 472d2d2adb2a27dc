"""Two extractions of the same images, compared object by object: other weights, other layers, another precision."""

from __future__ import annotations

from typing import Any

import numpy as np

from detr_lightning.analysis.objects import CORNERS, objects
from detr_lightning.analysis.overlap import Annotated, assign, check_iou
from detr_lightning.analysis.vectors import embeddings_of, linear_cka
from detr_lightning.errors import InputError
from detr_lightning.store.store import EmbeddingStore

import pandas as pd  # isort: skip  # Below objects, which reports a missing pandas.


def align(one: pd.DataFrame, other: pd.DataFrame, iou: float = 0.5) -> pd.DataFrame:
    """Pair the objects of two tables of the same images by their boxes, regardless of their categories.

    Greedily, by descending score, each object of the first table is paired with the free object that it overlaps most.

    Args:
        one: Rows of `objects`.
        other: Rows of `objects` of another extraction. Images with the same file name are the same.
        iou: The smallest overlap of a pair.

    Returns:
        A row for each pair, in the order of the first table: `one` and `other`, the positions of its rows, and `iou`.

    Raises:
        InputError: The tables share no image.
        SettingError: `iou` is out of range.
    """
    check_iou(iou)
    by_file = other.groupby("file_name").indices
    groups = one.groupby("file_name").indices
    if len(one) and len(other) and not groups.keys() & by_file.keys():
        raise InputError(
            f"the tables share no image: one has {one['file_name'].iloc[0]!r}, "
            f"the other {other['file_name'].iloc[0]!r}."
        )
    pairs: list[dict[str, Any]] = []
    for file_name, rows in groups.items():
        others = by_file.get(file_name, np.empty(0, np.int64))
        mine, theirs = one.iloc[rows], other.iloc[others]
        boxes, other_boxes = (side[CORNERS].to_numpy(float) for side in (mine, theirs))
        annotated = Annotated(theirs["category_id"].to_numpy(), other_boxes, np.zeros(len(theirs), bool))
        scores, categories = mine["score"].to_numpy(), mine["category_id"].to_numpy()
        found = assign(boxes, scores, categories, annotated, iou, same_category=False)
        for position in np.flatnonzero(found.outcome == "matched"):
            partner = others[found.annotated[position]]
            pairs.append({"one": int(rows[position]), "other": int(partner), "iou": float(found.iou[position])})
    table = pd.DataFrame(pairs, columns=["one", "other", "iou"]).astype({"one": int, "other": int, "iou": float})
    return table.sort_values("one", ignore_index=True)


def compare(
    one: EmbeddingStore,
    other: EmbeddingStore,
    threshold: float = 0.7,
    iou: float = 0.5,
    debiased: bool = True,
) -> pd.DataFrame:
    """Return the linear CKA of each decoder layer of one extraction with each of another, over objects found in both.

    Args:
        one: An extraction with `pred_logits`, `pred_boxes`, and `decoder_output` or `query_embeddings`.
        other: An extraction of the same images.
        threshold: The lowest score of an object, in both.
        iou: The smallest overlap of the boxes of a pair.
        debiased: See `detr_lightning.analysis.vectors.linear_cka`.

    Returns:
        Layers of `one` as rows, of `other` as columns, named `decoder 1` to `decoder L`; just `decoder`, the last, if a
        store has only `query_embeddings`. `attrs["objects"]` is the number of pairs.

    Raises:
        InputError: The stores share no image, or too few objects were found in both.
        SettingError: A store lacks a key, or a setting is out of range.
    """
    from detr_lightning.analysis.features import object_features

    keys = [None if "decoder_output" in store.embedding_keys else "query_embeddings" for store in (one, other)]
    tables = [objects(store, threshold, key=key) for store, key in zip((one, other), keys, strict=True)]
    layers: list[dict[str, np.ndarray]] = []
    pairs = align(tables[0], tables[1], iou)
    if len(pairs) < 4:
        raise InputError(f"{len(pairs)} objects were found in both; at least 4 are needed. Lower the threshold.")
    for store, table, side in zip((one, other), tables, ("one", "other"), strict=True):
        chosen = table.iloc[pairs[side]].reset_index(drop=True)
        if "decoder_output" in store.embedding_keys:
            features = object_features(store, chosen, ["decoder_output"])
            layers.append({name: matrix for name, matrix in features.items() if name != "box"})
        else:
            layers.append({"decoder": embeddings_of(chosen)})
    values = linear_cka(list(layers[0].values()), list(layers[1].values()), debiased)
    result = pd.DataFrame(values, index=list(layers[0]), columns=list(layers[1]))
    result.attrs["objects"] = len(pairs)
    return result
