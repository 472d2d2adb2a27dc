"""The identity of a run: the model and the settings that two runs must share for their files to belong together.

Each default below is the value that was in force before the metadata recorded that field.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from detr_lightning.errors import InputError
from detr_lightning.format.entries import get_field
from detr_lightning.format.keys import ModelShape

_WEIGHTS = "weights (sha256)"

PREPROCESSING_BEFORE = {"exif": "ignore"}
"""Preprocessing settings that older metadata lacks, with the values that were then in force."""


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """The record of the model.

    Attributes:
        weights: The name of the weights.
        sha256: The sha256 of the weights; empty in a plan that is made without them.
        architecture: The sizes of the network, including those of `ModelShape`.
        family: The kind of detector, such as `detr` or `rt_detr_v2`.
        scoring: `softmax`, where the last logit is "no object", or `sigmoid`, where every logit is a category.
        category_ids: The COCO category id of each logit; None if the labels are not COCO's.
    """

    weights: str
    sha256: str
    architecture: Mapping[str, Any]
    family: str = "detr"
    scoring: str = "softmax"
    category_ids: Sequence[int | None] | None = None

    @property
    def shape(self) -> ModelShape:
        """The sizes that the shapes of the tensors depend on.

        Raises:
            InputError: The architecture lacks one.
        """
        return ModelShape.of_architecture(self.architecture)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object under `model` in `metadata.json`."""
        category_ids = None if self.category_ids is None else list(self.category_ids)
        return {**vars(self), "architecture": dict(self.architecture), "category_ids": category_ids}

    @classmethod
    def from_json(cls, content: Any) -> ModelRecord:
        """Return the record that `to_json` wrote.

        Raises:
            InputError: A field is missing or has the wrong type; the message names it.
        """
        if not isinstance(content, dict) or not isinstance(content.get("architecture"), dict):
            raise InputError("model.architecture is incomplete (it is not an object)")
        architecture = content["architecture"]
        ids = content.get("category_ids")
        if "category_ids" not in content and type(logits := architecture.get("num_logits")) is int:
            ids = range(logits - 1)  # Then each logit but the last had its index as category id.
        if not isinstance(ids, Sequence | None):
            raise InputError(f"model.category_ids is {ids!r}, not a list")
        return cls(
            weights=get_field(content, "weights", str, within="model."),
            sha256=get_field(content, "sha256", str, within="model."),
            architecture=architecture,
            family=get_field(content, "family", str, optional=True, within="model.") or cls.family,
            scoring=get_field(content, "scoring", str, optional=True, within="model.") or cls.scoring,
            category_ids=None if ids is None else tuple(ids),
        )


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The identity of a run: the settings that two runs must share for their files to belong in one folder.

    Attributes:
        model: The model.
        keys: The keys of each file, in the file's order.
        dtype: `writer.dtype`.
        preprocessing: The settings by which an image becomes the model's input.
        batching: How images are batched, with the batch size if results depend on it.
        precision: Lightning's precision, and TF32 if it was allowed.
        min_score: `writer.min_score`.
    """

    model: ModelRecord
    keys: tuple[str, ...]
    dtype: str
    preprocessing: Mapping[str, Any]
    batching: str
    precision: str
    min_score: float | None = None

    def differences(self, earlier: RunSettings) -> list[str]:
        """Describe the settings that differ from an earlier run's, under the names that users know.

        The weights are compared only if their hash is known.
        """
        then, now = earlier._named(), self._named()
        if not self.model.sha256:
            del then[_WEIGHTS], now[_WEIGHTS]
        names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
        return [f"{name} was {then.get(name)}, now {now.get(name)}" for name in names]

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> RunSettings:
        """Return the settings in the content of a `metadata.json` or `run.json`.

        Raises:
            InputError: A field is missing or has the wrong type; the message names it.
        """
        return cls(
            model=ModelRecord.from_json(get_field(content, "model", dict)),
            keys=tuple(get_field(content, "embedding_keys", list)),
            dtype=get_field(content, "dtype", str),
            preprocessing=get_field(content, "preprocessing", dict),
            batching=get_field(content, "batching", str),
            precision=get_field(content, "precision", str),
            min_score=get_field(content, "min_score", float, optional=True),
        )

    def _named(self) -> dict[str, Any]:
        named = {
            _WEIGHTS: self.model.sha256,
            "architecture": self.model.architecture,
            "model family": self.model.family,
            "scoring": self.model.scoring,
            "keys": self.keys,
            "writer.dtype": self.dtype,
            "writer.min_score": self.min_score,
            **{f"data.{name}": value for name, value in {**PREPROCESSING_BEFORE, **self.preprocessing}.items()},
            "data.batching": self.batching,
            "trainer.precision": self.precision,
        }
        plain: dict[str, Any] = json.loads(json.dumps(named))  # Tuples become lists, as in the files.
        return plain
