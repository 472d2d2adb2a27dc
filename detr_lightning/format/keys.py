"""The keys of a `.pt` file: those of each extract type, their shapes, dtypes and sizes in bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from detr_lightning.errors import InputError, SettingError, check_choice

EXTRACT_TYPES: dict[str, tuple[str, ...]] = {
    "all": (
        "backbone_features",
        "encoder_output",
        "decoder_output",
        "query_embeddings",
        "pred_logits",
        "pred_boxes",
    ),
    "decoder": ("decoder_output", "query_embeddings", "encoder_output", "pred_logits", "pred_boxes"),
    "encoder": ("encoder_output", "pred_logits", "pred_boxes"),
    "backbone": ("backbone_features", "pred_logits", "pred_boxes"),
}
"""The keys of each extract type, in the order of the files."""

ON_REQUEST = ("cross_attention", "encoder_layers")
"""Keys that no extract type includes; they are computed only when `model.keys` names them."""

KEYS = EXTRACT_TYPES["all"] + ON_REQUEST

QUERY_INDEX = "query_index"
"""The key for the numbers of the queries that a file keeps. Only `writer.min_score` adds it, not `model.keys`."""

PREDICTIONS = ("pred_logits", "pred_boxes")
"""Keys that stay float32 whatever `writer.dtype` is: half precision would move a box by up to half a pixel."""

AXES: dict[str, tuple[str, ...]] = {
    "backbone_features": ("channels", "height", "width"),
    "encoder_output": ("places", "features"),
    "decoder_output": ("layers", "queries", "features"),
    "query_embeddings": ("queries", "features"),
    "pred_logits": ("queries", "logits"),
    "pred_boxes": ("queries", "coordinates"),
    "cross_attention": ("layers", "queries", "places"),
    "encoder_layers": ("layers", "places", "features"),
    QUERY_INDEX: ("queries",),
}
"""The axes of each key. `places` are the positions of all feature maps that the decoder reads."""

SPATIAL = tuple(key for key, axes in AXES.items() if {"places", "height"} & set(axes))
"""Keys whose shape depends on the image's size."""

DTYPES = {"float32": torch.float32, "float16": torch.float16}
"""The values of `writer.dtype`."""

RESNET_CHANNELS = {"basic": 512, "bottleneck": 2048}
"""The channels of a ResNet's last feature map, by type of block."""

Size = tuple[int, int]
"""Height and width."""


def resolve_keys(extract_type: str = "decoder", keys: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the keys to extract: the explicit ones in their order, else those of the extract type.

    Raises:
        SettingError: The extract type or a key is unknown, a key occurs twice, or `keys` is empty or not a list.
    """
    check_choice("extract_type", extract_type, EXTRACT_TYPES)
    if keys is None:
        return EXTRACT_TYPES[extract_type]
    if isinstance(keys, str):
        raise SettingError(f"model.keys is {keys!r}, but must be a list, such as [{keys}].")
    if not keys:
        raise SettingError(f"model.keys is empty. Name at least one of {', '.join(KEYS)}, or leave it null.")
    for key in keys:
        check_choice("model.keys", key, KEYS)
    if len(set(keys)) < len(keys):
        raise SettingError(f"model.keys names a key twice: {', '.join(keys)}.")
    return tuple(keys)


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that the shapes of its tensors depend on.

    Attributes:
        feature_channels: Channels of the backbone's last feature map.
        hidden_dim: The transformer's width.
        encoder_layers: The number of encoder layers.
        decoder_layers: The number of decoder layers.
        num_queries: The number of object queries.
        num_logits: The number of class logits, including "no object" if the model has it.
    """

    feature_channels: int
    hidden_dim: int
    encoder_layers: int
    decoder_layers: int
    num_queries: int
    num_logits: int

    @classmethod
    def of_architecture(cls, architecture: Mapping[str, Any]) -> ModelShape:
        """Return the sizes in a recorded architecture. DETR records its ResNet's type of block instead of the channels.

        Raises:
            InputError: A size is missing or not an integer; the message names it.
        """
        sizes = dict(architecture)
        sizes.setdefault("feature_channels", RESNET_CHANNELS.get(str(sizes.get("block"))))
        wrong = [field.name for field in fields(cls) if type(sizes.get(field.name)) is not int]
        if wrong:
            raise InputError(f"model.architecture is incomplete (no {', '.join(wrong)})")
        return cls(*(sizes[field.name] for field in fields(cls)))


@dataclass(frozen=True, slots=True)
class FeatureSizes:
    """Heights and widths of one image's feature maps.

    Attributes:
        levels: The maps that the decoder's cross-attention reads, in the model's order.
        backbone: The backbone's last feature map.
    """

    levels: tuple[Size, ...]
    backbone: Size

    @classmethod
    def single(cls, size: Sequence[int]) -> FeatureSizes:
        """Return the sizes of an image with a single feature map of this size."""
        height, width = size
        return cls(((height, width),), (height, width))

    @property
    def places(self) -> int:
        """The number of positions in all levels, `sum(H*W)`."""
        return sum(height * width for height, width in self.levels)

    def fold(self, tensor: torch.Tensor, level: int) -> torch.Tensor:
        """Return one level of a tensor `[..., places]` as a map `[..., H, W]`."""
        part: torch.Tensor = tensor.split([height * width for height, width in self.levels], dim=-1)[level]
        return part.reshape(*part.shape[:-1], *self.levels[level])


def shape_of(key: str, model: ModelShape, features: FeatureSizes, num_queries: int | None = None) -> tuple[int, ...]:
    """Return the shape of one image's tensor.

    Args:
        key: One of `AXES`.
        model: The model's sizes.
        features: The sizes of the image's feature maps.
        num_queries: The number of queries that were kept; by default all.
    """
    height, width = features.backbone
    lengths = {
        "channels": model.feature_channels,
        "height": height,
        "width": width,
        "places": features.places,
        "features": model.hidden_dim,
        "layers": model.encoder_layers if key == "encoder_layers" else model.decoder_layers,
        "queries": model.num_queries if num_queries is None else num_queries,
        "logits": model.num_logits,
        "coordinates": 4,
    }
    return tuple(lengths[axis] for axis in AXES[key])


def dtype_of(key: str, dtype: str) -> torch.dtype:
    """Return the dtype in which a key is stored when `writer.dtype` is `dtype`."""
    if key == QUERY_INDEX:
        return torch.int64
    return torch.float32 if key in PREDICTIONS else DTYPES[dtype]


def nbytes(keys: Iterable[str], model: ModelShape, features: FeatureSizes, dtype: str) -> int:
    """Return the size of one image's tensors on disk in bytes, without the file's overhead of about 2 kB."""
    return sum(torch.Size(shape_of(key, model, features)).numel() * dtype_of(key, dtype).itemsize for key in keys)
