"""Which tensors an extraction keeps: their names, their shapes, their bytes, and how a batch of them becomes images."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from detr_lightning.model import Architecture

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


def one_of(name: str, value: str, allowed: Iterable[str]) -> str:
    """Return `value` if it is allowed, and say what is where it is not.

    Args:
        name: The setting, as the user writes it.
        value: What was given.
        allowed: What may be given.

    Raises:
        ValueError: `value` is not among `allowed`; the nearest name is suggested.
    """
    allowed = list(allowed)
    if value in allowed:
        return value
    near = difflib.get_close_matches(str(value), allowed, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name} is {value!r}, which is none of {', '.join(allowed)}.{hint}")


def resolve_keys(extract_type: str = "decoder", keys: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the keys to extract: the explicit ones in their order, else those of the extract type.

    Raises:
        ValueError: An unknown extract type or key, a key named twice, no list, or an empty one.
    """
    one_of("extract_type", extract_type, EXTRACT_TYPES)
    if keys is None:
        return EXTRACT_TYPES[extract_type]
    if isinstance(keys, str):
        raise ValueError(f"model.keys is {keys!r}, but must be a list, such as [{keys}].")
    if not keys:
        raise ValueError(f"model.keys is empty. Name at least one of {', '.join(KEYS)}, or leave it null.")
    for key in keys:
        one_of("model.keys", key, KEYS)
    if len(set(keys)) < len(keys):
        raise ValueError(f"model.keys names a key twice: {', '.join(keys)}.")
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


def split(batch: Mapping[str, Any]) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """Split what `predict_step` returned into images, each tensor cropped to the image's own area.

    Args:
        batch: `image_id` (list of int), `feature_size` (list of `(height, width)`), a batch-first tensor for each key
            and, where images were padded, `padding_mask` `[B, H, W]` at feature size, True on padding.

    Yields:
        An image's id and its tensors: views of the batch, not copies.
    """
    mask = batch.get("padding_mask")
    keys = [key for key in batch if key in KEYS]
    for index, (image_id, (height, width)) in enumerate(zip(batch["image_id"], batch["feature_size"], strict=True)):
        image = {}
        for key in keys:
            tensor = batch[key][index]
            if mask is not None:
                tensor = _crop(key, tensor, tuple(mask.shape[1:]), (height, width))
            image[key] = tensor
        yield image_id, image


def _crop(key: str, tensor: torch.Tensor, padded: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
    """Cut an image's tensor from the padded feature map down to the image's own part of it."""
    height, width = size
    if key == "backbone_features":  # [C, H, W]
        return tensor[:, :height, :width]
    if key == "encoder_output":  # [H*W, d]
        return tensor.view(*padded, -1)[:height, :width].flatten(0, 1)
    if key == "encoder_layers":  # [L, H*W, d]
        return tensor.view(len(tensor), *padded, -1)[:, :height, :width].flatten(1, 2)
    if key == "cross_attention":  # [L, Q, H*W]
        return tensor.view(*tensor.shape[:2], *padded)[:, :, :height, :width].flatten(2, 3)
    return tensor


class HostBatch:
    """A batch on its way to the CPU, one copy for each key, while the GPU goes on.

    Args:
        prediction: What `predict_step` returned.

    Attributes:
        tensors: The same on the CPU. What came from a GPU may be read after `wait`.
    """

    def __init__(self, prediction: Mapping[str, Any]) -> None:
        on_gpu = any(isinstance(value, torch.Tensor) and value.is_cuda for value in prediction.values())
        # torch copies to pinned memory when asked not to block.
        self.tensors = {
            key: value.detach().to("cpu", non_blocking=on_gpu) if isinstance(value, torch.Tensor) else value
            for key, value in prediction.items()
        }
        self._arrived: torch.cuda.Event | None = None
        if on_gpu:
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def wait(self) -> None:
        """Return when everything has arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()


def to_stored(key: str, image_id: int, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor as it is stored: contiguous, alone in its storage, in its dtype.

    Raises:
        ValueError: A value is not finite, or too large for the dtype; the message names the image and the key.
    """
    stored = torch.empty(tensor.shape, dtype=dtype).copy_(tensor)
    if not torch.isfinite(stored).all():
        if torch.isfinite(tensor).all():
            largest = tensor.abs().max().item()
            raise ValueError(
                f"image {image_id}: {key} reaches {largest:.6g}, more than {dtype} can hold. "
                "Store it with writer.dtype=float32."
            )
        raise ValueError(
            f"image {image_id}: {key} has values that are not finite. "
            "Check the weights, or compute in a wider precision (trainer.precision)."
        )
    return stored
