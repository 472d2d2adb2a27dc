"""The format on disk: the names of its files, and all that `metadata.json` and the journals record.

This is the one place that knows the names of the metadata's fields. A field that older metadata lacks counts as the
value that was then in force: each default below is that value.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, SupportsIndex

from detr_lightning.errors import InputError, SettingError
from detr_lightning.format.keys import FeatureSizes, ModelShape, Size

METADATA = "metadata.json"
STATE = ".extraction"
"""The subfolder of a run that has not finished; a finished folder has none."""

TEMPORARY = ".embedding_*.tmp"
"""Matches every temporary file of this format; what a dead run leaves of them is never read."""

ID_DIGITS = 12
MAX_ID = 10**ID_DIGITS - 1
"""Image ids are integers from 0 to this, so that they fit into a file's name."""

PREPROCESSING_BEFORE = {"exif": "ignore"}
"""Settings of the preprocessing that older metadata lacks, with the values that were then in force."""

_NAME = re.compile(rf"embedding_([0-9]{{{ID_DIGITS}}})\.pt")


def is_image_id(value: object) -> bool:
    """Return whether a value is an image id: an integer from 0 to `MAX_ID`."""
    return not isinstance(value, bool) and isinstance(value, SupportsIndex) and 0 <= operator.index(value) <= MAX_ID


def file_name(image_id: int) -> str:
    """Return the name of an image's file, `embedding_000000000139.pt` for 139.

    Raises:
        SettingError: The id is no integer, negative, or longer than 12 digits.
    """
    if not is_image_id(image_id):
        raise SettingError(f"image id {image_id!r} cannot name a file: an id is an integer from 0 to {MAX_ID}.")
    return f"embedding_{operator.index(image_id):0{ID_DIGITS}d}.pt"


def image_id_of(name: str) -> int | None:
    """Return the image id in a file's name, or None where the name is not one that `file_name` gives."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


@dataclass(frozen=True, slots=True)
class ImageEntry:
    """The record of one image: planned, or, with `features` and `bytes`, finished.

    Attributes:
        image_id: Its id.
        file_name: Its path relative to the image folder.
        width: Its width in pixels.
        height: Its height in pixels.
        input_size: The size in which the model saw it.
        features: The sizes of its feature maps.
        bytes: The size of its `.pt` file.
        checksum: The first 16 hex digits of the sha256 of its `.pt` file as written.
        num_queries: The queries that were kept, where `writer.min_score` was set.
        image_sha256: The sha256 of the image's own file, where `data.fingerprint` was `content`.
    """

    image_id: int
    file_name: str
    width: int
    height: int
    input_size: Size
    features: FeatureSizes | None = None
    bytes: int | None = None
    checksum: str | None = None
    num_queries: int | None = None
    image_sha256: str | None = None

    @property
    def size(self) -> Size:
        """Height and width in pixels."""
        return self.height, self.width

    @property
    def finished(self) -> bool:
        """Whether the image's file was written."""
        return self.features is not None and self.bytes is not None

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of `metadata.json` and the journals."""
        content: dict[str, Any] = {
            "id": self.image_id,
            "file_name": self.file_name,
            "width": self.width,
            "height": self.height,
            "input_size": self.input_size,
        }
        if self.features is not None:
            levels, backbone = self.features.levels, self.features.backbone
            if len(levels) == 1:
                content["feature_size"] = levels[0]
            else:
                content["feature_sizes"] = levels
            if levels != (backbone,):
                content["backbone_size"] = backbone
        for name in ("bytes", "checksum", "num_queries", "image_sha256"):
            if (value := getattr(self, name)) is not None:
                content[name] = value
        return content

    @classmethod
    def from_json(cls, content: Any) -> ImageEntry:
        """Return the entry that `to_json` gave.

        Raises:
            InputError: A field is missing or not of its type; the message names it.
        """
        _require_object(content)
        features = None
        if "feature_sizes" in content or "feature_size" in content:
            single = "feature_size" in content
            levels = (_size(content, "feature_size"),) if single else tuple(_sizes(content, "feature_sizes"))
            backbone = _size(content, "backbone_size") if "backbone_size" in content or not single else levels[0]
            features = FeatureSizes(levels, backbone)
        return cls(
            _id(content),
            _get(content, "file_name", str),
            _get(content, "width", int),
            _get(content, "height", int),
            _size(content, "input_size"),
            features,
            _get(content, "bytes", int, optional=True),
            _get(content, "checksum", str, optional=True),
            _get(content, "num_queries", int, optional=True),
            _get(content, "image_sha256", str, optional=True),
        )


@dataclass(frozen=True, slots=True)
class SkippedImage:
    """The record of an image that could not be read, and why."""

    image_id: int
    file_name: str
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of `metadata.json` and the journals."""
        return {"id": self.image_id, "file_name": self.file_name, "reason": self.reason}

    @classmethod
    def from_json(cls, content: Any) -> SkippedImage:
        """Return the entry that `to_json` gave.

        Raises:
            InputError: A field is missing or not of its type; the message names it.
        """
        _require_object(content)
        return cls(_id(content), _get(content, "file_name", str), _get(content, "reason", str))


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """The record of the model.

    Attributes:
        weights: The weights' name.
        sha256: Of the weights.
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
            weights=_get(content, "weights", str, within="model."),
            sha256=_get(content, "sha256", str, within="model."),
            architecture=architecture,
            family=_get(content, "family", str, optional=True, within="model.") or cls.family,
            scoring=_get(content, "scoring", str, optional=True, within="model.") or cls.scoring,
            category_ids=None if ids is None else tuple(ids),
        )


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The identity of a run: what two runs must share for their files to belong in one folder.

    Attributes:
        model: The model.
        keys: The keys of each file, in the file's order.
        dtype: `writer.dtype`.
        preprocessing: The settings of what happens to an image before the model sees it.
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
        """Return what an earlier run had set differently, under the names that users know."""
        then, now = earlier._named(), self._named()
        names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
        return [f"{name} was {then.get(name)}, now {now.get(name)}" for name in names]

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> RunSettings:
        """Return the settings in the content of a `metadata.json` or `run.json`.

        Raises:
            InputError: A field is missing or not of its type; the message names it.
        """
        return cls(
            model=ModelRecord.from_json(_get(content, "model", dict)),
            keys=tuple(_get(content, "embedding_keys", list)),
            dtype=_get(content, "dtype", str),
            preprocessing=_get(content, "preprocessing", dict),
            batching=_get(content, "batching", str),
            precision=_get(content, "precision", str),
            min_score=_get(content, "min_score", float, optional=True),
        )

    def _named(self) -> dict[str, Any]:
        named = {
            "weights (sha256)": self.model.sha256,
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
    """All that is recorded of a run besides its images.

    Attributes:
        extract_type: The extract type that was asked for.
        settings: What identifies the run.
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
            extract_type=_get(content, "extract_type", str),
            settings=RunSettings.from_json(content),
            categories=parse_categories(content),
            versions=_get(content, "versions", dict),
            config=_get(content, "config", dict),
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
    """

    run: RunRecord
    images: Sequence[ImageEntry]
    failed: Sequence[SkippedImage] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object, those fields first that readers look for first."""
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
            images=[ImageEntry.from_json(entry) for entry in _get(content, "images", list)],
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


def _require_object(content: Any) -> None:
    if not isinstance(content, dict):
        raise InputError(f"an image's entry is {content!r:.40}, no object")


def _get(content: Mapping[str, Any], name: str, kind: type, *, optional: bool = False, within: str = "") -> Any:
    value = content.get(name)
    if value is None and optional:
        return None
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise InputError(
            f"{within}{name} is {'missing' if value is None else f'{value!r:.40}, not of type {kind.__name__}'}"
        )
    return value


def _id(content: Mapping[str, Any]) -> int:
    image_id = content.get("id")
    if type(image_id) is not int or not 0 <= image_id <= MAX_ID:
        raise InputError(f"id is {image_id!r:.40}, no image id")
    return image_id


def _size(content: Mapping[str, Any], name: str) -> Size:
    return _as_size(_get(content, name, list), name)


def _sizes(content: Mapping[str, Any], name: str) -> Iterator[Size]:
    for size in _get(content, name, list):
        yield _as_size(size, name)


def _as_size(size: Any, name: str) -> Size:
    if not isinstance(size, list) or len(size) != 2 or any(type(side) is not int or side < 0 for side in size):
        raise InputError(f"{name} is {size!r:.40}, no height and width")
    return size[0], size[1]
