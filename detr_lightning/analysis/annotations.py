"""The annotated objects of a store's images, compared with the detections."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from detr_lightning.analysis.overlap import Annotated, assign
from detr_lightning.data.coco import COCOFile, read_coco_file
from detr_lightning.errors import DETRLightningWarning, InputError
from detr_lightning.model.labels import compare_names
from detr_lightning.store.predictions import Predictions
from detr_lightning.store.store import EmbeddingStore

COMPARED = ["outcome", "annotation_id", "annotated_category_id", "annotated_category", "iou"]
"""The columns of a table of objects that describe the annotated objects."""


class GroundTruth:
    """The annotated objects of many images, as arrays.

    Args:
        annotations: Entries with `id`, `image_id`, `category_id`, `bbox` `[x, y, width, height]` and `iscrowd`.
        categories: The name of each category id.
    """

    def __init__(self, annotations: Iterable[Mapping[str, Any]], categories: Mapping[int, str]) -> None:
        ordered = sorted(annotations, key=lambda annotation: annotation["image_id"])
        self._image_ids = np.array([annotation["image_id"] for annotation in ordered], np.int64)
        self._annotated = Annotated.of(ordered)
        self._ids = np.array(annotation_ids(ordered), object)
        self._categories = dict(categories)
        self.no_rows = {name: np.empty(0, object) for name in COMPARED} | {"iou": np.empty(0, np.float64)}
        """The columns of `compare`, with no rows."""

    @property
    def text_ids(self) -> bool:
        """Whether `annotation_id` is text, not an integer."""
        return any(isinstance(number, str) for number in self._ids)

    def compare(
        self, image_id: int, boxes_xyxy: np.ndarray, scores: np.ndarray, category_ids: np.ndarray, iou: float
    ) -> dict[str, np.ndarray]:
        """Return the columns `COMPARED` for the detections of an image."""
        low, high = np.searchsorted(self._image_ids, [image_id, image_id + 1])
        annotated = Annotated(*(values[low:high] for values in self._annotated))
        found = assign(boxes_xyxy, scores, category_ids, annotated, iou)
        near = found.annotated >= 0

        def of_annotated(values: list[Any]) -> np.ndarray:
            column = np.full(len(near), None, object)
            column[near] = [values[index] for index in found.annotated[near]]
            return column

        numbers = annotated.category_ids.tolist()
        return {
            "outcome": found.outcome,
            "annotation_id": of_annotated(self._ids[low:high].tolist()),
            "annotated_category_id": of_annotated(numbers),
            "annotated_category": of_annotated([self._categories[number] for number in numbers]),
            "iou": np.where(near, found.iou, np.nan),
        }


def annotation_ids(annotations: Iterable[Mapping[str, Any]]) -> list[int] | list[str | None]:
    """Return the `id` of each annotation, which may be of any type or missing.

    They become one column of a file, which has one type: all are text unless all are integers of 64 bits.
    """
    ids = [annotation.get("id") for annotation in annotations]
    if all(type(number) is int and abs(number) < 2**63 for number in ids):
        return ids
    return [None if number is None else str(number) for number in ids]


def read_ground_truth(annotation_file: str | os.PathLike[str], store: EmbeddingStore) -> GroundTruth:
    """Read the annotated objects of a store's images.

    Raises:
        FileNotFoundError: There is no such annotation file.
        InputError: The annotation file is not in COCO's format, or does not match the store's images or categories.
    """
    content = read_annotations(annotation_file, store, whole=False)
    return GroundTruth((entry for entry in content.annotations if entry["image_id"] in store), content.categories)


def read_annotations(annotation_file: str | os.PathLike[str], store: EmbeddingStore, whole: bool = True) -> COCOFile:
    """Read an annotation file, and check that it matches the store's images.

    Args:
        annotation_file: COCO's `instances_*.json`, or a file in its format.
        store: The extraction.
        whole: Keep every field of the annotations, not just those that evaluation needs.

    Raises:
        FileNotFoundError: There is no such file.
        InputError: It is not a COCO annotation file, or its images, sizes or categories do not match the store's.
    """
    content = read_coco_file(Path(annotation_file).expanduser(), "whole" if whole else "boxes", "annotation_file")
    records = {record.image_id: record for record in content.images}
    missing = [image_id for image_id in store if image_id not in records]
    if missing:
        raise InputError(
            f"{content.path} is from another dataset: of the {len(store)} images of {store.name} it does not list "
            f"{len(missing)}, for example {missing[0]}."
        )
    for image_id in store:
        entry, other = store.entry(image_id), records[image_id]
        if other.width and entry.size != other.size:
            raise InputError(
                f"{content.path} is from another dataset: image {image_id} is {other.width}x{other.height} there and "
                f"{entry.width}x{entry.height} in {store.name}."
            )
    differences, none_agrees = compare_names(Predictions(store).names, content.categories)
    if none_agrees:
        raise InputError(
            f"{content.path} has other categories than {store.name}: {differences}. "
            "Give annotations with the model's category ids."
        )
    if differences:
        message = f"{content.path} and {store.name} name categories differently: {differences}."
        warnings.warn(message, DETRLightningWarning, stacklevel=3)
    return content
