"""The format on disk: the keys, their shapes, dtypes and bytes, and the names of files."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from detr_lightning.errors import SettingError, check_choice

if TYPE_CHECKING:
    from detr_lightning.model.detr import Architecture

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
"""The keys of each extract type, in the order in which a file holds them."""

ON_REQUEST = ("cross_attention", "encoder_layers")
"""Keys that no extract type includes; they are computed only when `model.keys` names them."""

KEYS = EXTRACT_TYPES["all"] + ON_REQUEST
PREDICTIONS = ("pred_logits", "pred_boxes")
"""Keys that stay float32 whatever `writer.dtype` says: half precision would move a box by up to half a pixel."""

DTYPES = {"float32": torch.float32, "float16": torch.float16}
"""What `writer.dtype` may be."""


METADATA = "metadata.json"
STATE = ".extraction"
"""The subfolder of a run that has not finished; a finished folder has none."""

TEMPORARY = ".embedding_*.tmp"
"""Matches every temporary file that this module makes; what a dead run leaves of them is never read."""

_NAME = re.compile(r"embedding_([0-9]{12})\.pt")


def resolve_keys(extract_type: str = "decoder", keys: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the keys to extract: the explicit ones in their order, else those of the extract type.

    Raises:
        ValueError: An unknown extract type or key, a key named twice, no list, or an empty one.
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


def shape_of(key: str, architecture: Architecture, feature_size: tuple[int, int]) -> tuple[int, ...]:
    """Return the shape of one image's tensor.

    Args:
        key: One of `KEYS`.
        architecture: The model's sizes.
        feature_size: Height and width of the backbone's last feature map.
    """
    height, width = feature_size
    a = architecture
    return {
        "backbone_features": (a.feature_channels, height, width),
        "encoder_output": (height * width, a.hidden_dim),
        "decoder_output": (a.decoder_layers, a.num_queries, a.hidden_dim),
        "query_embeddings": (a.num_queries, a.hidden_dim),
        "pred_logits": (a.num_queries, a.num_logits),
        "pred_boxes": (a.num_queries, 4),
        "cross_attention": (a.decoder_layers, a.num_queries, height * width),
        "encoder_layers": (a.encoder_layers, height * width, a.hidden_dim),
    }[key]


def dtype_of(key: str, dtype: str) -> torch.dtype:
    """Return the dtype in which a key is stored when `writer.dtype` is `dtype`."""
    return torch.float32 if key in PREDICTIONS else DTYPES[dtype]


def nbytes(keys: Iterable[str], architecture: Architecture, feature_size: tuple[int, int], dtype: str) -> int:
    """Return the bytes of one image's tensors on disk, without the container's own (about 2 kB)."""
    return sum(
        torch.Size(shape_of(key, architecture, feature_size)).numel() * dtype_of(key, dtype).itemsize for key in keys
    )


def file_name(image_id: int) -> str:
    """Return the name of an image's file, `embedding_000000000139.pt` for 139.

    Raises:
        ValueError: The id is no integer, negative, or longer than 12 digits.
    """
    if isinstance(image_id, bool) or not hasattr(image_id, "__index__") or not 0 <= image_id < 10**12:
        raise SettingError(f"image id {image_id!r} cannot name a file: an id is an integer from 0 to 999999999999.")
    return f"embedding_{operator.index(image_id):012d}.pt"


def image_id_of(name: str) -> int | None:
    """Return the image id in a file's name, or None where the name is not one that `file_name` gives."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None
