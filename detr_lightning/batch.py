"""The batch that `predict_step` returns: splitting it into images, copying it to the CPU, preparing it for storage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from detr_lightning.detections import probabilities
from detr_lightning.errors import InputError
from detr_lightning.format.keys import AXES, KEYS, QUERY_INDEX, FeatureSizes
from detr_lightning.gpu import move, side_stream


def split(batch: Mapping[str, Any]) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """Split the result of `predict_step` into images, each tensor cropped to the image's own area.

    Args:
        batch: `image_id` (list of int), the sizes of feature maps, a batch-first tensor for each key and, if images
            were padded, `padding_mask` `[B, H, W]` at feature size, True on padding.

    Yields:
        The id and the tensors of each image; the tensors are views of the batch, not copies.
    """
    for index, (image_id, features) in enumerate(zip(batch["image_id"], sizes_of_batch(batch), strict=True)):
        yield image_id, image_at(index, batch, features)


def image_at(index: int, batch: Mapping[str, Any], features: FeatureSizes) -> dict[str, torch.Tensor]:
    """Return the tensors of image `index` of a batch, whose feature maps have the sizes `features`, as views."""
    mask = batch.get("padding_mask")
    image = {}
    for key in batch:
        if key in KEYS:
            tensor = batch[key][index]
            image[key] = tensor if mask is None else _crop(key, tensor, tuple(mask.shape[1:]), features.backbone)
    return image


def sizes_to_batch(features: Sequence[FeatureSizes]) -> dict[str, Any]:
    """Return the batch entries with the sizes of the feature maps, named as in `metadata.json`."""
    sizes: dict[str, Any] = {"feature_sizes": [list(one.levels) for one in features]}
    if all(len(one.levels) == 1 for one in features):
        sizes = {"feature_size": [one.levels[0] for one in features]}
    if any(one.levels != (one.backbone,) for one in features):
        sizes["backbone_size"] = [one.backbone for one in features]
    return sizes


def sizes_of_batch(batch: Mapping[str, Any]) -> list[FeatureSizes]:
    """Return the sizes of each image's feature maps from the entries that `sizes_to_batch` returns."""
    levels = batch["feature_sizes"] if "feature_sizes" in batch else [[size] for size in batch["feature_size"]]
    backbones = batch.get("backbone_size") or [one[0] for one in levels]
    return [FeatureSizes(tuple(one), backbone) for one, backbone in zip(levels, backbones, strict=True)]


def _crop(key: str, tensor: torch.Tensor, padded: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
    """Crop an image's tensor from the padded feature map to the image's own part."""
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
    """A batch that is being copied to the CPU, one copy per key, while the GPU keeps computing.

    Args:
        prediction: The result of `predict_step`.

    Attributes:
        tensors: The batch on the CPU. If it comes from a GPU, call `wait` before reading the tensors.
    """

    def __init__(self, prediction: Mapping[str, Any]) -> None:
        device = next((value.device for value in prediction.values() if getattr(value, "is_cuda", False)), None)
        self._arrived: torch.cuda.Event | None = None
        if device is None:
            self.tensors = move(prediction, torch.device("cpu"))
            return
        downloads = side_stream("downloads", device)
        downloads.wait_stream(torch.cuda.current_stream(device))
        self.tensors = move(prediction, torch.device("cpu"), downloads)
        self._arrived = downloads.record_event()

    def wait(self) -> None:
        """Wait until all copies are done."""
        if self._arrived is not None:
            self._arrived.synchronize()


def keep_queries(
    image_id: int, tensors: Mapping[str, torch.Tensor], min_score: float, scoring: str
) -> dict[str, torch.Tensor]:
    """Return an image's tensors, restricted to the queries that score at least `min_score`, and their indices.

    Args:
        image_id: The image's id, for error messages.
        tensors: The image's tensors by key, including `pred_logits`.
        min_score: The lowest score of a query's best category.
        scoring: `softmax` or `sigmoid`; see `probabilities`.

    Returns:
        The same tensors, with length `K` along the query axis if they have one, and `query_index` `[K]`.

    Raises:
        InputError: The logits are not finite.
    """
    logits = tensors["pred_logits"].to(torch.float32)  # as they are stored
    check_finite("pred_logits", image_id, logits)
    kept = (probabilities(logits, scoring).amax(-1) >= min_score).nonzero().flatten()  # [K]
    selected = {
        key: tensor.index_select(AXES[key].index("queries"), kept) if "queries" in AXES[key] else tensor
        for key, tensor in tensors.items()
    }
    return {**selected, QUERY_INDEX: kept}


def to_stored(key: str, image_id: int, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a copy of a tensor for storage: contiguous, with its own memory, in the given dtype.

    Raises:
        InputError: A value is not finite, or too large for the dtype; the message names the image and the key.
    """
    stored = torch.empty(tensor.shape, dtype=dtype).copy_(tensor)
    if not _is_finite(stored):
        check_finite(key, image_id, tensor)
        raise InputError(
            f"image {image_id}: {key} reaches {tensor.abs().max().item():.6g}, more than {dtype} can hold. "
            "Store it with writer.dtype=float32."
        )
    return stored


def check_finite(key: str, image_id: int, tensor: torch.Tensor) -> None:
    """Check that an image's tensor contains no NaN or infinity.

    Raises:
        InputError: A value is not finite; the message names the image and the key.
    """
    if not _is_finite(tensor):
        raise InputError(
            f"image {image_id}: {key} has values that are not finite. "
            "Check the weights, or compute in a wider precision (trainer.precision)."
        )


def _is_finite(tensor: torch.Tensor) -> bool:
    # The extremes are NaN if any value is. `isfinite` on all values takes fifteen times as long.
    return not tensor.numel() or all(torch.isfinite(extreme) for extreme in torch.aminmax(tensor))
