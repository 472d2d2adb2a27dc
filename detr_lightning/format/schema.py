"""The record of a run: all that `metadata.json` holds.

With entries.py this is the one place that defines the names of the fields. A field that older metadata lacks counts as
the value that was then in force: each default below is that value.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from detr_lightning.errors import InputError
from detr_lightning.format.entries import ImageEntry, SkippedImage, get_field
from detr_lightning.format.keys import ModelShape

FILES, LANCE = LAYOUTS = ("files", "lance")
"""The values of `writer.layout`."""

_WEIGHTS = "weights (sha256)"

PREPROCESSING_BEFORE = {"exif": "ignore"}
"""Settings of the preprocessing that older metadata lacks, with the values that were then in force."""


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """The record of the model.

    Attributes:
        weights: The weights' name.
        sha256: Of the weights; empty in a plan that is made without them.
        architecture: The sizes of the network, those of `ModelShape` among them.
        family: Which kind of detector it is, such as `detr` or `rt_detr_v2`.
        scoring: `softmax`, where the last logit is "no object", or `sigmoid`, where every logit is a category.
        category_ids: The COCO category id of each logit; None where the labels are not COCO's.
    """

    weights: str
    sha256: str
    architecture: Mapping[str, Any]
    family: str = "detr"
    scoring: str = "softmax"
    category_ids: Sequence[int | None] | None = None

    @property
    def shape(self) -> ModelShape:
        """The sizes that shapes depend on.

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
        """Return the record that `to_json` gave.

        Raises:
            InputError: A field is missing or not of its type; the message names it.
        """
        if not isinstance(content, dict) or not isinstance(content.get("architecture"), dict):
            raise InputError("model.architecture is incomplete (it is no object)")
        architecture = content["architecture"]
        ids = content.get("category_ids")
        if "category_ids" not in content and type(logits := architecture.get("num_logits")) is int:
            ids = range(logits - 1)  # Each logit but the last was the category of that id.
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
        preprocessing: The settings of the way from an image to the model's input.
        batching: How images share batches, as far as results depend on it.
        precision: Lightning's precision, and TF32 where it was allowed.
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
        """Return the settings in which an earlier run differs, under the names that users know.

        Unknown weights are not compared.
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
            InputError: A field is missing or not of its type; the message names it.
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
        plain: dict[str, Any] = json.loads(json.dumps(named))  # A tuple here is a list there.
        return plain


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """Everything that is recorded of a run except its images.

    Attributes:
        extract_type: The extract type that was asked for.
        settings: The settings that identify the run.
        categories: The categories' names by logit index.
        versions: The packages that results may depend on.
        config: The settings as given.
    """

    extract_type: str
    settings: RunSettings
    categories: Mapping[int, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self, first: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the JSON object; `first` follows the fields that readers look for first."""
        settings = self.settings
        return {
            "extract_type": self.extract_type,
            "embedding_keys": list(settings.keys),
            **(first or {}),
            "categories": {str(index): name for index, name in sorted(self.categories.items())},
            "model": settings.model.to_json(),
            "preprocessing": dict(settings.preprocessing),
            "batching": settings.batching,
            "dtype": settings.dtype,
            "precision": settings.precision,
            **({} if settings.min_score is None else {"min_score": settings.min_score}),
            "versions": dict(self.versions),
            "config": dict(self.config),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> RunRecord:
        """Return the record that `to_json` gave.

        Raises:
            InputError: Fields are missing or not of their type; the message names them.
        """
        if missing := [name for name in _RUN_FIELDS if name not in content]:
            raise InputError(f"{', '.join(missing)} is missing")
        return cls(
            extract_type=get_field(content, "extract_type", str),
            settings=RunSettings.from_json(content),
            categories=parse_categories(content),
            versions=get_field(content, "versions", dict),
            config=get_field(content, "config", dict),
        )


_RUN_FIELDS = (
    *("extract_type", "embedding_keys", "categories", "model", "preprocessing"),
    *("batching", "dtype", "precision", "versions", "config"),
)


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """The content of a `metadata.json`.

    Attributes:
        run: All but the images.
        images: The finished images, ascending by id.
        failed: The images that were skipped.
        layout: `files`, or `lance`, where the images are in the table instead.
    """

    run: RunRecord
    images: Sequence[ImageEntry]
    failed: Sequence[SkippedImage] = ()
    layout: str = FILES

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object, those fields first that readers look for first."""
        if self.layout == LANCE:
            failed = [entry.to_json() for entry in self.failed]
            return {"num_images": len(self.images), **self.run.to_json(), "failed": failed, "layout": LANCE}
        images = [entry.to_json() for entry in self.images]
        content = self.run.to_json({"images": images})
        ids = [entry.image_id for entry in self.images]
        failed = [entry.to_json() for entry in self.failed]
        return {"image_ids": ids, "num_images": len(ids), **content, "failed": failed}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Metadata:
        """Return the metadata that `to_json` gave.

        Raises:
            InputError: A field is missing or not of its type; the message names it.
        """
        return cls(
            run=RunRecord.from_json(content),
            images=[ImageEntry.from_json(entry) for entry in get_field(content, "images", list)],
            failed=[SkippedImage.from_json(entry) for entry in content.get("failed", ())],
        )


def parse_categories(content: Mapping[str, Any]) -> dict[int, str]:
    """Return the categories' names by logit index; none where they are not recorded.

    Raises:
        InputError: They are no object, or an index is no number.
    """
    try:
        return {int(index): str(name) for index, name in (content.get("categories") or {}).items()}
    except (ValueError, AttributeError) as error:
        raise InputError("categories is no object of names by logit index") from error
