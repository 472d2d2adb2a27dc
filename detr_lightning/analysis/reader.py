"""Reading the objects of a store, a few images at a time, as the columns of a table."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import InitVar, dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from detr_lightning.analysis.annotations import COMPARED, read_ground_truth
from detr_lightning.analysis.overlap import area_classes, check_iou
from detr_lightning.errors import SettingError, count
from detr_lightning.parallel import track
from detr_lightning.store.predictions import Predictions
from detr_lightning.store.store import EmbeddingStore

CORNERS = ["x1", "y1", "x2", "y2"]
COLUMNS = ["image_id", "file_name", "query", "category_id", "category", "score", *CORNERS, "bbox", "area_class"]
_BLOCK = 64
"""How many images are read at a time."""

Columns = dict[str, np.ndarray]
"""The columns of some rows by name: `[N]`, or `[N, 4]` for `bbox` and `[N, d]` for `embedding`."""


def check_layer(layer: int, layers: int) -> int:
    """Return the number of a decoder layer if the decoder has it; negative numbers count from the last.

    Raises:
        SettingError: It does not.
    """
    if not -layers <= layer < layers:
        raise SettingError(f"layer is {layer}; the decoder has {layers} layers, 0 to {layers - 1}.")
    return layer


@dataclass
class ObjectReader:
    """Reads the objects of a store.

    Args:
        store: A folder with `pred_logits` and `pred_boxes`.
        threshold: The lowest score.
        image_ids: Which images; by default all.
        key: Where `embedding` comes from: `query_embeddings`, `decoder_output`, or None for no embeddings.
        layer: With `decoder_output`, which decoder layer.
        annotation_file: A COCO annotation file to compare the objects with.
        iou: The smallest overlap with an annotated object that counts as found.

    Raises:
        FileNotFoundError: There is no such annotation file.
        UnknownImageError: The store has no such image.
        InputError: The annotation file is not in COCO's format, or does not match the store's images or categories.
        SettingError: The folder lacks a key, or a setting is out of range.
    """

    store: EmbeddingStore
    threshold: float = 0.7
    image_ids: InitVar[Iterable[int] | None] = None
    key: str | None = "query_embeddings"
    layer: int = -1
    annotation_file: str | os.PathLike[str] | None = None
    iou: float = 0.5

    def __post_init__(self, image_ids: Iterable[int] | None) -> None:
        if not 0 <= self.threshold <= 1:
            raise SettingError(f"threshold is {self.threshold}; a score is a probability, from 0 to 1.")
        if self.key not in (None, "query_embeddings", "decoder_output"):
            raise SettingError(f"key is {self.key!r}, but must be query_embeddings, decoder_output or None.")
        check_iou(self.iou)
        store, file = self.store, self.annotation_file
        self.predictions = Predictions(store, self.threshold)
        store.require(*([self.key] if self.key else []))
        self.ids = [store.entry(image_id).image_id for image_id in (store if image_ids is None else image_ids)]
        self.ground_truth = None if file is None else read_ground_truth(file, store)
        self.best, self.best_image = -1.0, -1
        compared = COMPARED if self.ground_truth else []
        self.columns = [*COLUMNS, *compared, *(["embedding"] if self.key else [])]

    def blocks(self, progress: bool | None = None) -> Iterator[Columns]:
        """Yield the columns of a few images at a time; without images, those of a table with no rows."""
        names = self.predictions.names
        starts = range(0, max(len(self.ids), 1), _BLOCK)
        for start in track(starts, len(starts), "Reading objects", progress):
            yield self._block(self.ids[start : start + _BLOCK], names)

    def nothing_found(self) -> str:
        """Return why no object was found, once all blocks have been read."""
        if not self.ids:
            return f"No image of {self.store.name} was chosen. It has {len(self.store)} images."
        if self.best_image < 0:
            return (
                f"{self.store.name} keeps no query of {count(len(self.ids), 'image')}: none scored "
                f"{self.store.min_score} or more. Extract into another folder with a lower writer.min_score."
            )
        return (
            f"No query of {len(self.ids)} images scores {self.threshold} or more; the best is {self.shown_best}, "
            f"in image {self.best_image}. Lower the threshold."
        )

    @property
    def shown_best(self) -> str:
        """The best score with three digits, rounded down, so that a score below 1 is not shown as 1."""
        return f"{math.floor(self.best * 1000) / 1000:.3f}"

    def _block(self, ids: list[int], names: dict[int, str]) -> Columns:
        images = [self.no_rows, *filter(None, map(self._image, ids))]
        block = {name: np.concatenate([image[name] for image in images]) for name in self.no_rows}
        extent = block["x2"] - block["x1"], block["y2"] - block["y1"]
        block["category"] = np.array([names.get(number, str(number)) for number in block["category_id"]], object)
        block["bbox"] = np.stack([block["x1"], block["y1"], *extent], axis=1)
        block["area_class"] = area_classes(extent[0] * extent[1])
        return {name: block[name] for name in self.columns}

    def _image(self, image_id: int) -> Columns | None:
        entry = self.store.entry(image_id)
        found = self.predictions[image_id]
        if len(found.scores) and (top := found.scores.max().item()) > self.best:
            self.best, self.best_image = top, image_id
        rows = (found.scores >= self.threshold).nonzero().flatten()  # [N]
        if not len(rows):
            return None
        corners = found.boxes_xyxy[rows].double().numpy()
        columns = {
            "image_id": np.full(len(rows), image_id),
            "file_name": np.full(len(rows), entry.file_name, object),
            "query": self.store.queries(image_id, len(found.scores))[rows].numpy(),
            "category_id": found.labels[rows].numpy(),
            "score": found.scores[rows].double().numpy(),
            **dict(zip(CORNERS, corners.T, strict=True)),
        }
        if self.ground_truth is not None:
            found_by = (corners, columns["score"], columns["category_id"])
            columns |= self.ground_truth.compare(image_id, *found_by, self.iou)
        if self.key is not None:
            columns["embedding"] = self._queries(image_id)[rows].float().numpy()
        return columns

    def _queries(self, image_id: int) -> Tensor:
        tensor = self.store.load(image_id, str(self.key))
        if self.key != "decoder_output":
            return tensor  # [Q, d]
        return tensor[check_layer(self.layer, len(tensor))]

    @cached_property
    def no_rows(self) -> Columns:
        """The columns that `_image` returns, with no rows."""
        integers, texts, numbers = np.empty(0, np.int64), np.empty(0, object), np.empty(0, np.float64)
        columns = {"image_id": integers, "file_name": texts, "query": integers, "category_id": integers}
        columns |= {"score": numbers, **dict.fromkeys(CORNERS, numbers)}
        if self.ground_truth is not None:
            columns |= self.ground_truth.no_rows
        if self.key is not None:
            width = self._queries(self.store.image_ids[0]).shape[-1] if len(self.store) else 1
            columns["embedding"] = np.empty((0, width), np.float32)
        return columns
