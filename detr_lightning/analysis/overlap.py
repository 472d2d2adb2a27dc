"""Overlaps of boxes, the matching of detections with annotated objects, and the kinds of errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from detr_lightning.errors import SettingError

AREAS = {"small": 32**2, "medium": 96**2, "large": float("inf")}
"""COCO's size classes: each contains areas, in square pixels, below its number."""

BACKGROUND_IOU = 0.1
"""A detection that overlaps every annotated object by less than this counts as background, as in TIDE."""


class Annotated(NamedTuple):
    """The annotated objects of one image, crowds included."""

    category_ids: np.ndarray
    """`[M]`."""
    boxes_xyxy: np.ndarray
    """`[M, 4]`."""
    crowd: np.ndarray
    """`[M]`, bool: whether it stands for many objects; no detection is matched with it."""

    @classmethod
    def of(cls, annotations: Sequence[Mapping[str, Any]]) -> Annotated:
        """Return the objects of annotations with `category_id`, `bbox` `[x, y, width, height]` and `iscrowd`."""
        boxes = np.array([annotation["bbox"] for annotation in annotations], np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]  # xywh -> xyxy
        category_ids = np.array([annotation["category_id"] for annotation in annotations], np.int64)
        return cls(category_ids, boxes, np.array([annotation["iscrowd"] for annotation in annotations], bool))


class Assignment(NamedTuple):
    """For each detection of an image: the annotated object that it was compared with, and the outcome."""

    annotated: np.ndarray
    """`[N]`: the position of the annotated object; -1 if there is none."""
    iou: np.ndarray
    """`[N]`: the overlap with it; for a crowd, divided by the detection's own area."""
    outcome: np.ndarray
    """`[N]`: `matched`, `crowd`, or the kind of error, as `OUTCOMES` explains them."""


OUTCOMES = {
    "matched": "matched with an annotated object",
    "crowd": "overlaps a crowd of its category: COCO does not count it as an error",
    "localization": "the right category, but too little overlap",
    "classification": "overlaps an annotated object of another category",
    "duplicate": "overlaps an object of its category that is matched with another detection",
    "background": "overlaps no annotated object",
    "both": "another category, and too little overlap",
}
"""The outcomes of a detection. The errors are those of TIDE (Bolya et al., 2020), decided in the order of its code."""


def area_classes(areas: np.ndarray) -> np.ndarray:
    """Return `small`, `medium` or `large` for each area in square pixels."""
    places = np.searchsorted(list(AREAS.values()), areas, side="right").clip(max=len(AREAS) - 1)
    return np.asarray(np.array(list(AREAS))[places])


def overlaps(boxes: np.ndarray, others: np.ndarray, crowd: np.ndarray | None = None) -> np.ndarray:
    """Return the intersection over union of `[N, 4]` and `[M, 4]` boxes, given by corners, as `[N, M]`.

    Args:
        boxes: The boxes of detections.
        others: The boxes of annotated objects.
        crowd: `[M]`, True if the intersection is divided by the detection's own area, as in COCO's evaluation.
    """
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = (high - low).clip(min=0).prod(-1)  # [N, M]
    own = (boxes[:, 2:] - boxes[:, :2]).prod(-1)[:, None]
    union = own + (others[:, 2:] - others[:, :2]).prod(-1)[None] - shared
    if crowd is not None:
        union = np.where(crowd[None], own, union)
    return np.asarray(shared / np.maximum(union, 1e-12))


def check_iou(iou: float) -> None:
    """Check the smallest overlap of a match.

    Raises:
        SettingError: It is out of range.
    """
    if not 0 < iou <= 1:
        raise SettingError(f"iou is {iou}, but must be above 0 and at most 1.")


def assign(
    boxes: np.ndarray,
    scores: np.ndarray,
    category_ids: np.ndarray,
    annotated: Annotated,
    iou: float,
    same_category: bool = True,
) -> Assignment:
    """Match the detections of an image with its annotated objects, one to one, as COCO's evaluation does.

    By descending score, each detection is matched with the free object of its category that it overlaps most, if
    that overlap is `iou` or more.

    Args:
        boxes: `[N, 4]`, corners.
        scores: `[N]`.
        category_ids: `[N]`.
        annotated: The image's annotated objects.
        iou: The smallest overlap of a match.
        same_category: Whether the categories must agree.
    """
    nearest, best = np.full(len(boxes), -1), np.zeros(len(boxes))
    outcome = np.full(len(boxes), "background", dtype=object)
    if not len(boxes) or not len(annotated.category_ids):
        return Assignment(nearest, best, outcome)
    every = overlaps(boxes, annotated.boxes_xyxy, annotated.crowd)  # [N, M]
    agree = category_ids[:, None] == annotated.category_ids
    same = agree | (not same_category)
    free = every * (same & ~annotated.crowd)
    for position in np.argsort(-scores, kind="stable"):
        candidate = int(free[position].argmax())
        if free[position, candidate] >= iou:
            nearest[position], best[position] = candidate, free[position, candidate]
            outcome[position] = "matched"
            free[:, candidate] = 0
    single, crowd = every * ~annotated.crowd, every * (annotated.crowd & agree)
    for position in np.flatnonzero(outcome != "matched"):
        kind, row = _explain(single[position], crowd[position], same[position], iou)
        outcome[position] = kind
        if kind != "background":
            nearest[position] = int(row.argmax())
            best[position] = row[nearest[position]]
    return Assignment(nearest, best, outcome)


def _explain(single: np.ndarray, crowd: np.ndarray, same: np.ndarray, iou: float) -> tuple[str, np.ndarray]:
    """Return why a detection was not matched, and the overlaps `[M]`, the largest of which is the reason."""
    right, wrong = single * same, single * ~same
    if crowd.max() >= iou:
        return "crowd", crowd
    if BACKGROUND_IOU <= right.max() < iou:
        return "localization", right
    if wrong.max() >= iou:
        return "classification", wrong
    if right.max() >= iou:
        return "duplicate", right
    if single.max() < BACKGROUND_IOU:
        return "background", single
    return "both", wrong
