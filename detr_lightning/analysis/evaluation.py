"""COCO's metrics from an extraction, without running the model again."""

from __future__ import annotations

import os
from typing import Any

from detr_lightning.analysis.annotations import read_annotations
from detr_lightning.detections import coco_results, evaluate
from detr_lightning.errors import InputError
from detr_lightning.parallel import track
from detr_lightning.store.predictions import Predictions
from detr_lightning.store.store import EmbeddingStore


def evaluate_store(
    store: EmbeddingStore, annotation_file: str | os.PathLike[str], progress: bool | None = None
) -> dict[str, float]:
    """Return COCO's twelve metrics for a store's detections, over the images of the store.

    They equal those that `validate` computes for the same model and images.

    Args:
        store: A folder with the `pred_logits` and `pred_boxes` of all queries.
        annotation_file: COCO's `instances_*.json` of these images, or one in its format.
        progress: Show a progress bar; by default for more than 1000 images or after two seconds.

    Returns:
        The metrics by their names in `detr_lightning.detections.METRICS`, from 0 to 1; -1 if no annotated object has
        that size.

    Raises:
        FileNotFoundError: There is no such annotation file.
        InputError: The store keeps only some queries; or the annotation file is not in COCO's format, does not match
            the store's images or categories, or has no annotation for them.
        SettingError: The store lacks the logits or boxes.
    """
    if store.min_score is not None:
        raise InputError(
            f"{store.name} keeps only queries that score {store.min_score} or more. Average precision needs all: "
            "extract without writer.min_score, or run `validate`."
        )
    predictions = Predictions(store)
    content = read_annotations(annotation_file, store, whole=False)
    ground_truth = content.ground_truth(store.image_ids)
    rows: list[dict[str, Any]] = []
    for image_id in track(store, len(store), "Reading detections", progress):
        rows += coco_results(image_id, predictions.best(image_id))
    return evaluate(ground_truth, rows, store.image_ids)
