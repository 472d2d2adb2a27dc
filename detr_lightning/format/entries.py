"""The records of individual images, as `metadata.json` and the journals store them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from detr_lightning.errors import InputError
from detr_lightning.format.keys import FeatureSizes, Size
from detr_lightning.format.names import MAX_ID


@dataclass(frozen=True, slots=True)
class ImageEntry:
    """The record of one image: planned, or finished if `features` and `bytes` are set.

    Attributes:
        image_id: The image's id.
        file_name: The path of the image's file, relative to the image folder.
        width: The image's width in pixels.
        height: The image's height in pixels.
        input_size: The size at which the model sees the image.
        features: The sizes of the image's feature maps.
        bytes: The size of the `.pt` file in bytes.
        checksum: The first 16 hex digits of the sha256 of the `.pt` file as written.
        num_queries: The number of queries that were kept, if `writer.min_score` was set.
        image_sha256: The sha256 of the image's own file, if `data.fingerprint` was `content`.
        orientation: The EXIF orientation, 2 to 8; None if viewers show the image as it is stored.
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
    orientation: int | None = None

    @property
    def size(self) -> Size:
        """Height and width in pixels."""
        return self.height, self.width

    @property
    def finished(self) -> bool:
        """Whether the image's file was written."""
        return self.features is not None and self.bytes is not None

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that `metadata.json` and the journals store."""
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
        for name in ("bytes", "checksum", "num_queries", "image_sha256", "orientation"):
            if (value := getattr(self, name)) is not None:
                content[name] = value
        return content

    @classmethod
    def from_json(cls, content: Any) -> ImageEntry:
        """Return the entry that `to_json` wrote.

        Raises:
            InputError: A field is missing or has the wrong type; the message names it.
        """
        _require_object(content)
        features = None
        if "feature_sizes" in content or "feature_size" in content:
            single = "feature_size" in content
            levels = (_size(content, "feature_size"),) if single else tuple(_sizes(content, "feature_sizes"))
            backbone = _size(content, "backbone_size") if "backbone_size" in content or not single else levels[0]
            features = shared_features(levels, backbone)
        return cls(
            _id(content),
            get_field(content, "file_name", str),
            get_field(content, "width", int),
            get_field(content, "height", int),
            _size(content, "input_size"),
            features,
            get_field(content, "bytes", int, optional=True),
            get_field(content, "checksum", str, optional=True),
            get_field(content, "num_queries", int, optional=True),
            get_field(content, "image_sha256", str, optional=True),
            get_field(content, "orientation", int, optional=True),
        )


@dataclass(frozen=True, slots=True)
class SkippedImage:
    """The record of an image that could not be read, with the reason."""

    image_id: int
    file_name: str
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that `metadata.json` and the journals store."""
        return {"id": self.image_id, "file_name": self.file_name, "reason": self.reason}

    @classmethod
    def from_json(cls, content: Any) -> SkippedImage:
        """Return the entry that `to_json` wrote.

        Raises:
            InputError: A field is missing or has the wrong type; the message names it.
        """
        _require_object(content)
        return cls(_id(content), get_field(content, "file_name", str), get_field(content, "reason", str))


def get_field(content: Mapping[str, Any], name: str, kind: type, *, optional: bool = False, within: str = "") -> Any:
    """Return a field of a JSON object.

    Raises:
        InputError: The field is missing or has another type; the message names it.
    """
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


def _require_object(content: Any) -> None:
    if not isinstance(content, dict):
        raise InputError(f"an image's entry is {content!r:.40}, not an object")


@lru_cache(maxsize=4096)
def shared_features(levels: tuple[Size, ...], backbone: Size) -> FeatureSizes:
    """Return the sizes of feature maps. Equal ones share an object: a million images have only a few hundred."""
    return FeatureSizes(levels, backbone)


def _id(content: Mapping[str, Any]) -> int:
    image_id = content.get("id")
    if type(image_id) is not int or not 0 <= image_id <= MAX_ID:
        raise InputError(f"id is {image_id!r:.40}, not an image id")
    return image_id


def _size(content: Mapping[str, Any], name: str) -> Size:
    return _as_size(get_field(content, name, list), name)


def _sizes(content: Mapping[str, Any], name: str) -> Iterator[Size]:
    for size in get_field(content, name, list):
        yield _as_size(size, name)


def _as_size(size: Any, name: str) -> Size:
    if not isinstance(size, list) or len(size) != 2 or any(type(side) is not int or side < 0 for side in size):
        raise InputError(f"{name} is {size!r:.40}, not a height and width")
    return shared_size(size[0], size[1])


@lru_cache(maxsize=4096)
def shared_size(height: int, width: int) -> Size:
    """Return a size. Equal sizes share an object."""
    return height, width
