"""The join of detections with COCO's annotations: which annotated objects were found, which were missed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from detr_lightning.analysis.objects import CORNERS, objects
from detr_lightning.data.coco import COCOFile, read_coco_file
from detr_lightning.store.store import EmbeddingStore

# Below objects, which says what to install where pandas is missing.
import pandas as pd  # isort: skip
from detr_lightning.errors import InputError, SettingError

AREAS = {"small": 32**2, "medium": 96**2, "large": float("inf")}
"""COCO's classes of an object's area in pixels: each reaches up to its number."""


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
    """Join what was detected with COCO's annotations of the same images, one to one.

    As in COCO's evaluation, detections take their turn by score, and each takes the annotated object of its category
    that it overlaps most, if that is `iou` or more and no other detection has it already. Crowds are left out.
    For what embeddings tell of an object's category, let the model's own opinion of it not choose the objects:
    `same_category=False` matches by place alone.

    Args:
        store: The extraction.
        annotation_file: COCO's `instances_*.json` of these images, or one in its format.
        detections: A table of `objects`, perhaps filtered; by default all above `threshold`.
        iou: The smallest overlap, intersection over union.
        threshold: As for `objects`, where `detections` is not given.
        same_category: Whether a detection must name the annotated category. `category` is the annotation's.

    Returns:
        `annotated`: a row for each annotated object of the store's images, with every field of its annotation (its
        `id` is `annotation_id`), `category`, `area_class` (small, medium, large), `found`, and, where it was found,
        `query`, `score`, `iou`, the corners of the detected box, and `embedding`. `unmatched`: the other detections;
        `on_crowd` says whether one lies on a crowd, where COCO does not count it as an error.

    Raises:
        FileNotFoundError: There is no such annotation file.
        InputError: It is no COCO annotation file, or one of other images.
    """
    if not 0 < iou <= 1:
        raise SettingError(f"iou is {iou}; an overlap is above 0 and at most 1.")
    content = _read(annotation_file, store)
    if detections is None:
        detections = objects(store, threshold)
    detections = detections.reset_index(drop=True)
    by_image = detections.groupby("image_id").indices

    ground_truth: dict[int, list[dict[str, Any]]] = {image_id: [] for image_id in store}
    for annotation in content.annotations:
        if annotation["image_id"] in ground_truth:
            ground_truth[annotation["image_id"]].append(annotation)

    fields = [name for name in ("query", "score", *CORNERS, "embedding") if name in detections]
    values = {name: detections[name].tolist() for name in fields}
    rows: list[dict[str, Any]] = []
    taken: set[int] = set()
    on_crowd: set[int] = set()
    for image_id, everything in ground_truth.items():
        crowds = [annotation for annotation in everything if annotation["iscrowd"]]
        annotated = [annotation for annotation in everything if not annotation["iscrowd"]]
        indices = by_image.get(image_id, np.empty(0, dtype=np.int64))
        pairs = _assign(detections.iloc[indices], annotated, iou, same_category)
        for annotation, pair in zip(annotated, pairs, strict=True):
            row: dict[str, Any] = {"annotation_id": annotation.get("id")}
            row.update((name, value) for name, value in annotation.items() if name != "id")
            row["category"] = content.categories[annotation["category_id"]]
            row["area_class"] = next(name for name, limit in AREAS.items() if annotation["area"] < limit)
            row["found"] = pair is not None
            if pair is not None:
                index = int(indices[pair[0]])
                taken.add(index)
                row["iou"] = pair[1]
                row.update((name, values[name][index]) for name in fields)
            rows.append(row)
        if crowds and len(indices):
            frame = detections.iloc[indices]
            same = frame["category_id"].to_numpy()[:, None] == [crowd["category_id"] for crowd in crowds]
            covered = _overlaps(frame[CORNERS].to_numpy(float), crowds, crowd=True) * same
            on_crowd.update(int(index) for index in indices[(covered >= iou).any(1)])

    table = pd.DataFrame(rows, columns=None if rows else ["annotation_id", "image_id", "category_id", "found"])
    for name in ("iou", *fields):
        if name not in table:
            table[name] = None
    table["query"] = table["query"].astype("Int64")
    others = detections.drop(index=sorted(taken))
    others["on_crowd"] = others.index.isin(on_crowd)
    return Match(table, others.reset_index(drop=True))


def _assign(
    detections: pd.DataFrame, annotated: list[dict[str, Any]], iou: float, same_category: bool
) -> list[tuple[int, float] | None]:
    """Return for each annotated object of an image the position of its detection and their overlap, or None."""
    pairs: list[tuple[int, float] | None] = [None] * len(annotated)
    if not annotated or detections.empty:
        return pairs
    overlaps = _overlaps(detections[CORNERS].to_numpy(float), annotated)
    if same_category:
        overlaps[detections["category_id"].to_numpy()[:, None] != [a["category_id"] for a in annotated]] = 0
    for position in np.argsort(-detections["score"].to_numpy(), kind="stable"):
        best = int(overlaps[position].argmax())
        if overlaps[position, best] >= iou:
            pairs[best] = (int(position), float(overlaps[position, best]))
            overlaps[:, best] = 0  # Taken.
    return pairs


def _overlaps(boxes: np.ndarray, annotated: list[dict[str, Any]], crowd: bool = False) -> np.ndarray:
    """Return the intersection over union of boxes `[N, 4]` and annotations; over the box itself for a crowd."""
    other = np.array([annotation["bbox"] for annotation in annotated], float)
    other[:, 2:] += other[:, :2]  # xywh -> xyxy
    low = np.maximum(boxes[:, None, :2], other[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], other[None, :, 2:])
    shared = (high - low).clip(min=0).prod(-1)  # [N, M]
    own = (boxes[:, 2:] - boxes[:, :2]).prod(-1)[:, None]
    union = own if crowd else own + (other[:, 2:] - other[:, :2]).prod(-1)[None] - shared
    return np.asarray(shared / np.maximum(union, 1e-12))


def _read(annotation_file: str | os.PathLike[str], store: EmbeddingStore) -> COCOFile:
    """Read an annotation file and check that it is of the store's images.

    Raises:
        FileNotFoundError: There is no such file.
        InputError: It is no COCO annotation file, or its images, sizes or categories are others than the store's.
    """
    content = read_coco_file(Path(annotation_file).expanduser(), "whole", "annotation_file")
    records = {record.image_id: record for record in content.images}
    missing = [image_id for image_id in store if image_id not in records]
    if missing:
        raise InputError(
            f"{content.path} is of another dataset: of the {len(store)} images of {store.folder} it does not list "
            f"{len(missing)}, for example {missing[0]}."
        )
    for image_id in store:
        entry, other = store.entry(image_id), records[image_id]
        if other.width and entry.size != other.size:
            raise InputError(
                f"{content.path} is of another dataset: image {image_id} is {other.width}x{other.height} there and "
                f"{entry.width}x{entry.height} in {store.folder}."
            )
    for index, name in store.categories.items():
        if content.categories.get(index, name) != name:
            raise InputError(
                f"{content.path} calls category {index} {content.categories[index]!r}, "
                f"{store.folder} calls it {name!r}."
            )
    return content
