"""Checking the tensors of one image: their shapes, dtypes and values, and that they agree with each other."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from detr_lightning.detections import SCORINGS, probabilities
from detr_lightning.errors import InputError
from detr_lightning.format.entries import ImageEntry
from detr_lightning.format.files import is_plain
from detr_lightning.format.keys import AXES, DTYPES, QUERY_INDEX, ModelShape, dtype_of, shape_of
from detr_lightning.format.metadata import MetadataFile
from detr_lightning.format.names import METADATA

UNIT_RANGE = ("pred_boxes", "cross_attention")
"""Keys whose values are in `[0, 1]`."""

UNBOUNDED_BOXES = ("d_fine", "deimv2", "lw_detr", "rf_detr")
"""The model families whose boxes may reach beyond the image: no sigmoid ends their box heads."""


@dataclass(frozen=True)
class Expected:
    """The properties that tensors must have, from the metadata; None if it is incomplete."""

    shape: ModelShape | None = None
    dtype: str | None = None
    min_score: float | None = None
    scoring: str = "softmax"
    family: str = "detr"

    @classmethod
    def of(cls, metadata: MetadataFile) -> Expected:
        """Return the properties that follow from an extraction's metadata."""
        try:
            settings = metadata.settings
            scoring = settings.model.scoring if settings.model.scoring in SCORINGS else "softmax"
            dtype = settings.dtype if settings.dtype in DTYPES else None
            return cls(settings.model.shape, dtype, settings.min_score, scoring, settings.model.family)
        except InputError:
            return cls()


def tensor_problems(expected: Expected, entry: ImageEntry, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield the problems of an image's tensors, without the image's name.

    Args:
        expected: The properties that they must have.
        entry: The image's entry in the metadata.
        tensors: The image's tensors, by key.
    """
    for key, tensor in tensors.items():
        for problem in _tensor_problems(expected, entry, key, tensor):
            yield f"{key} {problem}"
    if all(map(is_plain, tensors.values())):
        yield from _problems_together(expected, entry, tensors)


def _problems_together(expected: Expected, entry: ImageEntry, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    if QUERY_INDEX in tensors:
        yield from _index_problems(expected, entry, tensors)
    if "decoder_output" in tensors and "query_embeddings" in tensors:
        decoder, queries = tensors["decoder_output"], tensors["query_embeddings"]
        if not (decoder.ndim and len(decoder) and torch.equal(decoder[-1], queries)):
            yield "query_embeddings are not the last layer of decoder_output"


def _index_problems(expected: Expected, entry: ImageEntry, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    queries, recorded = tensors[QUERY_INDEX].flatten().tolist(), entry.num_queries
    if recorded != len(queries):
        yield f"{QUERY_INDEX} has {len(queries)} queries, but {METADATA} records {recorded}"
    total = expected.shape.num_queries if expected.shape else sys.maxsize
    if queries != sorted(set(queries)) or (queries and not 0 <= queries[0] <= queries[-1] < total):
        yield f"{QUERY_INDEX} does not list queries of the model in ascending order"
    if expected.min_score is not None and "pred_logits" in tensors and queries:
        lowest = probabilities(tensors["pred_logits"], expected.scoring).amax(-1).min()
        if lowest < expected.min_score:  # in the scores' precision, as it was kept
            yield f"pred_logits keeps a query that scores {lowest:.4f}, less than {expected.min_score}"


def _tensor_problems(expected: Expected, entry: ImageEntry, key: str, tensor: Tensor) -> Iterator[str]:
    if key not in AXES:
        return
    shape = None
    if entry.features is None:
        yield f"has no feature_size in {METADATA}, so its shape cannot be checked"
    elif expected.shape is not None:
        shape = shape_of(key, expected.shape, entry.features, entry.num_queries)
    if shape is not None and tuple(tensor.shape) != shape:
        yield f"has shape {list(tensor.shape)}, expected {list(shape)}"
    if expected.dtype is not None and tensor.dtype != (dtype := dtype_of(key, expected.dtype)):
        yield f"is {tensor.dtype}, expected {dtype}"
    if not is_plain(tensor):
        yield "is not contiguous in its own storage"
    elif not torch.isfinite(tensor).all():
        yield "has values that are not finite"
    elif key == "pred_boxes" and expected.family in UNBOUNDED_BOXES:
        return
    elif key in UNIT_RANGE and tensor.numel() and not 0 <= tensor.min() <= tensor.max() <= 1:
        yield f"has values from {tensor.min():.4g} to {tensor.max():.4g}, outside of [0, 1]"
