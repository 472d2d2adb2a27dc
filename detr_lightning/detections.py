"""Conversion of logits and relative boxes to detections in pixels, COCO's results and COCO's metrics."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from detr_lightning.errors import SettingError, check_choice

SCORINGS = ("softmax", "sigmoid")
"""The two ways to turn logits into probabilities."""

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""COCO's twelve metrics in COCO's order: average precision, then average recall; s, m and l are object sizes."""


class Detections(NamedTuple):
    """One detection for each query, in the order of the queries, not of the scores."""

    scores: Tensor
    """`[..., Q]`: the probability of the likeliest category."""
    labels: Tensor
    """`[..., Q]`: the index of the likeliest category's logit, without "no object"."""
    boxes_xyxy: Tensor
    """`[..., Q, 4]`: corners in pixels of the original image; a box may reach a little beyond the image."""


def detect(
    pred_logits: Tensor, pred_boxes: Tensor, size: tuple[int, int] | Tensor, scoring: str = "softmax"
) -> Detections:
    """Turn a model's predictions into one detection per query, as the official DETR does (models/detr.py).

    Args:
        pred_logits: `[..., Q, num_logits]`.
        pred_boxes: `[..., Q, 4]`: center x, center y, width, height, relative to the image.
        size: `(height, width)` of the original image, or a tensor `[..., 2]` of them.
        scoring: See `probabilities`.

    Returns:
        Detections in float32, unless the predictions are of higher precision.

    Raises:
        SettingError: The scoring is unknown.
    """
    scores, labels = probabilities(pred_logits, scoring).max(-1)
    boxes_cxcywh = pred_boxes.to(torch.promote_types(pred_boxes.dtype, torch.float32))
    center, extent = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:]
    boxes = torch.cat([center - extent / 2, center + extent / 2], dim=-1)
    height, width = torch.as_tensor(size, device=boxes.device).unbind(-1)
    scale = torch.stack([width, height, width, height], dim=-1)
    return Detections(scores, labels, boxes * scale.unsqueeze(-2))


def best_detections(
    pred_logits: Tensor,
    pred_boxes: Tensor,
    size: tuple[int, int] | Tensor,
    scoring: str = "softmax",
    num_queries: int | None = None,
) -> Detections:
    """Return the detections that the model's official evaluation counts, as many as it has queries.

    With softmax they are those of `detect`. With sigmoid they are the highest-scoring pairs of query and category, so
    one query can give several detections and another none.

    Args:
        pred_logits: `[Q, num_logits]`.
        pred_boxes: `[Q, 4]`: center x, center y, width, height, relative to the image.
        size: `(height, width)` of the original image.
        scoring: See `probabilities`.
        num_queries: The model's queries, if not all of them are given.

    Raises:
        SettingError: The scoring is unknown.
    """
    found = detect(pred_logits, pred_boxes, size, scoring)
    if scoring == "softmax":
        return found
    scores = probabilities(pred_logits, scoring)  # [Q, C]
    best = scores.flatten().topk(min(num_queries or len(scores), scores.numel()))
    query, label = best.indices // scores.shape[-1], best.indices % scores.shape[-1]
    return Detections(best.values, label, found.boxes_xyxy[query])


def to_coco_ids(detections: Detections, category_ids: Sequence[int | None] | None) -> Detections:
    """Return detections whose labels are COCO category ids; a logit without one keeps its index.

    Args:
        detections: As `detect` returns them.
        category_ids: The COCO category id of each logit; None leaves the labels as they are.
    """
    if category_ids is None:
        return detections
    ids = [index if number is None else number for index, number in enumerate(category_ids)]
    return detections._replace(labels=torch.tensor(ids)[detections.labels])


def probabilities(pred_logits: Tensor, scoring: str = "softmax") -> Tensor:
    """Return the probability of each category.

    Args:
        pred_logits: `[..., num_logits]`.
        scoring: `softmax`, where the last logit is "no object", or `sigmoid`, where every logit is a category.

    Returns:
        `[..., C]`, in float32, unless the logits are of higher precision.

    Raises:
        SettingError: The scoring is unknown.
    """
    check_choice("scoring", scoring, SCORINGS)
    logits = pred_logits.to(torch.promote_types(pred_logits.dtype, torch.float32))
    return logits.sigmoid() if scoring == "sigmoid" else logits.softmax(-1)[..., :-1]


def coco_results(image_id: int, detections: Detections, threshold: float = 0.0) -> list[dict[str, Any]]:
    """Return an image's detections as rows of a COCO results file.

    Args:
        image_id: The image's id.
        detections: The detections of this image.
        threshold: Detections that score less are left out; 0 keeps one for each query, as the official evaluation does.
    """
    corner, opposite = detections.boxes_xyxy[..., :2], detections.boxes_xyxy[..., 2:]
    boxes = torch.cat([corner, opposite - corner], dim=-1).tolist()  # xyxy -> xywh
    kept = (detections.scores >= threshold).tolist()  # in the scores' precision, as everywhere
    rows = zip(kept, detections.scores.tolist(), detections.labels.tolist(), boxes, strict=True)
    return [
        {"image_id": int(image_id), "category_id": label, "bbox": box, "score": score}
        for keep, score, label, box in rows
        if keep
    ]


def evaluate(
    coco_ground_truth: Any, results: Sequence[Mapping[str, Any]], image_ids: Iterable[int] | None = None
) -> dict[str, float]:
    """Return COCO's twelve metrics for detected boxes.

    Args:
        coco_ground_truth: The annotations: a COCO dataset (the content of an `instances_*.json`), or a
            `pycocotools.coco.COCO` of it. The ids of the annotations are not used.
        results: Rows as `coco_results` returns them; they are not modified. Without rows, nothing was detected.
        image_ids: The images to evaluate; by default, all images in the annotations, so name the images of a subset.
            Images without detections count.

    Returns:
        The metrics by the names in `METRICS`, from 0 to 1; -1 if no annotated object has that size.

    Raises:
        SettingError: A result is for an image that is not in the annotations.
    """
    from pycocotools.cocoeval import COCOeval

    dataset = getattr(coco_ground_truth, "dataset", coco_ground_truth)
    known = {image["id"] for image in dataset["images"]}
    if unknown := {row["image_id"] for row in results} - known:
        raise SettingError(
            f"image {min(unknown)} has detections but is not in the annotations, which list {len(known)} images. "
            "Give the annotation file of the images with the detections."
        )
    detected = [{**row, "area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0} for row in results]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(_indexed(dataset, dataset["annotations"]), _indexed(dataset, detected), "bbox")
        if image_ids is not None:
            evaluation.params.imgIds = sorted(set(image_ids))
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: float(value) for name, value in zip(METRICS, evaluation.stats, strict=True)}


def _indexed(dataset: Mapping[str, Any], annotations: Iterable[Mapping[str, Any]]) -> Any:
    """Return a `pycocotools.coco.COCO` of annotations numbered from 1.

    pycocotools keeps one annotation per id and uses id 0 for "not matched". Its own `loadRes` modifies its rows,
    fails without rows, and requires keys that hand-made annotation files lack.
    """
    from pycocotools.coco import COCO

    coco = COCO()
    coco.dataset = {
        "images": dataset["images"],
        "categories": dataset.get("categories", []),
        "annotations": [{**annotation, "id": number} for number, annotation in enumerate(annotations, start=1)],
    }
    coco.createIndex()
    return coco
