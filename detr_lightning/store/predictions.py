"""The detections of a store: its stored logits and boxes, scored as the model scores them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from detr_lightning.detections import Detections, best_detections, detect, to_coco_ids
from detr_lightning.errors import SettingError
from detr_lightning.format.keys import Size
from detr_lightning.store.store import EmbeddingStore


class Predictions:
    """Reads the detections of a store's images.

    Args:
        store: A folder with `pred_logits` and `pred_boxes`.
        threshold: The lowest score that will be asked for.

    Raises:
        SettingError: The folder lacks one of them, or keeps only queries that score more than `threshold`.
        InputError: The record of the model is damaged.
    """

    def __init__(self, store: EmbeddingStore, threshold: float = 1.0) -> None:
        store.require("pred_logits", "pred_boxes")
        if store.min_score is not None and threshold < store.min_score:
            raise SettingError(
                f"threshold is {threshold}, but {store.name} keeps only queries that score {store.min_score} or more. "
                "Raise the threshold to that, or extract into another folder with a lower writer.min_score."
            )
        self.store = store
        model = store.metadata_file.model
        self.scoring = model.scoring if model else "softmax"
        self._ids = model.category_ids if model else None
        self._num_queries = model.shape.num_queries if model else None
        ids = [index if number is None else number for index, number in enumerate(self._ids or ())]
        self.names = {ids[index] if index < len(ids) else index: name for index, name in store.categories.items()}
        """The names of the labels."""

    def __getitem__(self, image_id: int) -> Detections:
        """Return the detections of an image, one per stored query; `labels` are COCO category ids where known.

        Raises:
            UnknownImageError: The store has no such image.
        """
        return to_coco_ids(detect(*self._stored(image_id), self.scoring), self._ids)

    def best(self, image_id: int) -> Detections:
        """Return the detections of an image that the model's own evaluation counts.

        Raises:
            UnknownImageError: The store has no such image.
        """
        found = best_detections(*self._stored(image_id), self.scoring, self._num_queries)
        return to_coco_ids(found, self._ids)

    def _stored(self, image_id: int) -> tuple[Tensor, Tensor, Size]:
        logits, boxes = (self.store.load(image_id, key) for key in ("pred_logits", "pred_boxes"))
        return logits, boxes, self.store.entry(image_id).size


class CategoryCount(NamedTuple):
    """The number of detections of a category, and their mean score."""

    name: str
    objects: int
    mean_score: float


def count_categories(store: EmbeddingStore, threshold: float = 0.7, limit: int = 1000) -> list[CategoryCount]:
    """Return the categories of the detections, the most frequent first.

    Args:
        store: A folder with `pred_logits` and `pred_boxes`.
        threshold: The lowest score that counts.
        limit: The most images to read, spread evenly over the store.

    Raises:
        SettingError: The folder lacks a key, or keeps only queries that score more than `threshold`.
        InputError: The record of the model is damaged.
    """
    predictions = Predictions(store, threshold)
    scores: dict[int, list[float]] = {}
    ids = store.image_ids
    chosen = min(limit, len(ids))
    for image_id in (ids[number * len(ids) // chosen] for number in range(chosen)):
        found = predictions[image_id]
        sure = found.scores >= threshold
        for label, score in zip(found.labels[sure].tolist(), found.scores[sure].tolist(), strict=True):
            scores.setdefault(label, []).append(score)
    counts = [
        CategoryCount(predictions.names.get(label, str(label)), len(values), sum(values) / len(values))
        for label, values in scores.items()
    ]
    return sorted(counts, key=lambda count: (-count.objects, count.name))
