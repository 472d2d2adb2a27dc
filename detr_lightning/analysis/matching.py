"""Joining detections with COCO's annotations: which annotated objects were found, and which were missed."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np

from detr_lightning.analysis.annotations import annotation_ids, read_annotations
from detr_lightning.analysis.objects import CORNERS, objects
from detr_lightning.analysis.overlap import Annotated, area_classes, assign, check_iou
from detr_lightning.store.store import EmbeddingStore

# Below objects, which reports a missing pandas.
import pandas as pd  # isort: skip


_OF_DETECTION = ("query", "score", *CORNERS, "embedding")
_OWN = {"annotation_id", "file_name", "category", "area_class", "found", "iou", *_OF_DETECTION}
"""The columns that `match` fills itself. An annotation's own field of such a name would be mistaken for them."""


class Match(NamedTuple):
    """Annotated objects joined with detections."""

    annotated: pd.DataFrame
    """A row for each annotated object, found or missed."""
    unmatched: pd.DataFrame
    """The detections that belong to no annotated object: rows of `objects` with a column `on_crowd`."""


def match(
    store: EmbeddingStore,
    annotation_file: str | os.PathLike[str],
    detections: pd.DataFrame | None = None,
    iou: float = 0.5,
    threshold: float = 0.7,
    same_category: bool = True,
) -> Match:
    """Match detections with COCO's annotations of the same images, one to one.

    As in COCO's evaluation, by descending score each detection is matched with the free annotated object of its
    category that it overlaps most, if that overlap is `iou` or more. Crowds are left out. To study how embeddings
    encode the category, match by boxes alone (`same_category=False`), so that errors of the model are included.

    Args:
        store: The extraction.
        annotation_file: COCO's `instances_*.json` of these images, or one in its format.
        detections: A table of `objects`, perhaps filtered; by default all of them.
        iou: The smallest overlap, intersection over union.
        threshold: As for `objects`, if `detections` is not given.
        same_category: Whether a detection must have the annotated category. `category` is always the annotation's.

    Returns:
        `annotated`: a row for each annotated object of the store's images, with `annotation_id` (its `id`, as text
        unless all are integers), `file_name`, `category`, `area_class` (small, medium, large), `found`, and, if it was
        found, `query`, `score`, `iou`, the corners of the detected box, and `embedding`. Every other field of the
        annotation is a column too. `unmatched`: the other detections; `on_crowd` is True for one that overlaps a
        crowd, which COCO does not count as an error.

    Raises:
        FileNotFoundError: There is no such annotation file.
        InputError: The annotation file is not in COCO's format, or does not match the store's images or categories.
        SettingError: The store lacks a key, or a setting is out of range.
    """
    check_iou(iou)
    content = read_annotations(annotation_file, store)
    if detections is None:
        detections = objects(store, threshold)
    detections = detections.reset_index(drop=True)
    by_image = detections.groupby("image_id").indices

    ground_truth: dict[int, list[dict[str, Any]]] = {image_id: [] for image_id in store}
    annotations = [annotation for annotation in content.annotations if annotation["image_id"] in ground_truth]
    for annotation, number in zip(annotations, annotation_ids(annotations), strict=True):
        ground_truth[annotation["image_id"]].append({**annotation, "id": number})

    fields = [name for name in _OF_DETECTION if name in detections]
    values = {name: detections[name].tolist() for name in fields}
    rows: list[dict[str, Any]] = []
    taken: set[int] = set()
    on_crowd: set[int] = set()
    for image_id, annotated in ground_truth.items():
        indices = by_image.get(image_id, np.empty(0, dtype=np.int64))
        boxes, scores, categories = (
            detections.iloc[indices][names].to_numpy() for names in (CORNERS, "score", "category_id")
        )
        found = assign(boxes, scores, categories, Annotated.of(annotated), iou, same_category)
        on_crowd.update(indices[found.outcome == "crowd"].tolist())
        of_annotation = {
            int(found.annotated[position]): position for position in np.flatnonzero(found.outcome == "matched")
        }
        sizes = area_classes(np.array([annotation["area"] for annotation in annotated]))
        for number, annotation in enumerate(annotated):
            if annotation["iscrowd"]:
                continue
            position = of_annotation.get(number)
            row: dict[str, Any] = {"annotation_id": annotation["id"]}
            row.update((name, value) for name, value in annotation.items() if name != "id" and name not in _OWN)
            row["file_name"] = store.entry(image_id).file_name
            row["category"] = content.categories[annotation["category_id"]]
            row["area_class"] = sizes[number]
            row["found"] = position is not None
            if position is not None:
                index = int(indices[position])
                taken.add(index)
                row["iou"] = float(found.iou[position])
                row.update((name, values[name][index]) for name in fields)
            rows.append(row)

    table = pd.DataFrame(rows, columns=None if rows else ["annotation_id", "image_id", "category_id", "found"])
    for name in ("iou", *fields):
        if name not in table:
            table[name] = None
    table["query"] = table["query"].astype("Int64")
    others = detections.drop(index=sorted(taken))
    others["on_crowd"] = others.index.isin(on_crowd)
    return Match(table, others.reset_index(drop=True))
