"""The detections of a store: its stored logits and boxes, scored as its model scores them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from detr_lightning.detections import Detections, detect
from detr_lightning.errors import SettingError
from detr_lightning.format.schema import ModelRecord
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
                f"threshold is {threshold}, and {store.name} keeps only queries that score {store.min_score} or more. "
                "Give a threshold that is not lower, or extract into another folder with a lower writer.min_score."
            )
        self.store = store
        content = store.metadata.get("model")
        model = None if content is None else ModelRecord.from_json(content)
        self.scoring = model.scoring if model else "softmax"
        ids: Sequence[int | None] = model.category_ids or () if model else ()
        labels = [index if number is None else number for index, number in enumerate(ids)]
        self._labels = torch.tensor(labels)
        self.names = {labels[index] if index < len(labels) else index: name for index, name in store.categories.items()}
        """The names of the labels."""

    def __getitem__(self, image_id: int) -> Detections:
        """Return the detections of an image, one per stored query; `labels` are COCO category ids where known.

        Raises:
            UnknownImageError: The store holds no such image.
        """
        logits, boxes = (self.store.load(image_id, key) for key in ("pred_logits", "pred_boxes"))
        found = detect(logits, boxes, self.store.entry(image_id).size, self.scoring)
        return found._replace(labels=self._labels[found.labels]) if len(self._labels) else found
