"""DETR: pixels in, embeddings and boxes out."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_lightning.errors import SettingError
from detr_lightning.format.keys import KEYS, RESNET_CHANNELS, FeatureSizes, ModelShape
from detr_lightning.format.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from detr_lightning.model.detr.backbone import Backbone
from detr_lightning.model.detr.position_encoding import LearnedPositionEncoding, SinePositionEncoding
from detr_lightning.model.detr.transformer import Transformer


@dataclass(frozen=True)
class Architecture:
    """The sizes of a DETR. The defaults are the official DETR-R50's.

    Attributes:
        block: The type of the ResNet's blocks, `basic` or `bottleneck`.
        blocks: The number of blocks in each stage of the ResNet.
        hidden_dim: The transformer's width.
        nheads: The number of attention heads.
        encoder_layers: The number of encoder layers.
        decoder_layers: The number of decoder layers.
        feedforward_dim: The width inside the feed-forward networks.
        num_queries: The number of object queries.
        num_logits: The number of class logits, "no object" included.
        dilation: Whether the last stage of the ResNet is dilated (DC5).
        pre_norm: Whether norms come before each sublayer instead of after it.
        learned_positions: The number of rows and columns with learned positions; 0 for the fixed sine encoding.
    """

    block: str = "bottleneck"
    blocks: tuple[int, ...] = (3, 4, 6, 3)
    hidden_dim: int = 256
    nheads: int = 8
    encoder_layers: int = 6
    decoder_layers: int = 6
    feedforward_dim: int = 2048
    num_queries: int = 100
    num_logits: int = 92
    dilation: bool = False
    pre_norm: bool = False
    learned_positions: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the sizes as the metadata records them, without unused options."""
        optional = {name for name in ("pre_norm", "learned_positions") if not getattr(self, name)}
        return {name: value for name, value in vars(self).items() if name not in optional}

    @property
    def feature_channels(self) -> int:
        """The channels of the ResNet's last feature map."""
        return RESNET_CHANNELS[self.block]

    @property
    def shape(self) -> ModelShape:
        """The sizes that the shapes of the tensors depend on."""
        return ModelShape.of_architecture(vars(self))

    @property
    def name(self) -> str:
        """The usual name, such as `DETR-R50-DC5`."""
        layers = 2 + sum(self.blocks) * (2 if self.block == "basic" else 3)
        return f"DETR-R{layers}" + "-DC5" * self.dilation

    def feature_size(self, input_size: tuple[int, int]) -> tuple[int, int]:
        """Return the height and width of the last feature map for an input of this height and width.

        Raises:
            SettingError: The feature map has more rows or columns than the model has learned positions.
        """
        stride = 16 if self.dilation else 32
        height, width = -(-input_size[0] // stride), -(-input_size[1] // stride)
        if self.learned_positions and max(height, width) > self.learned_positions:
            raise SettingError(
                f"The model has learned positions for {self.learned_positions} rows and columns of features, but an "
                f"image of {input_size[1]}x{input_size[0]} (width x height, resized) has {width}x{height}. "
                f"Set data.long_side to {self.learned_positions * stride} or less."
            )
        return height, width

    def feature_sizes(self, input_size: tuple[int, int]) -> FeatureSizes:
        """Return the sizes of an image's feature maps. DETR has only one; see `feature_size`."""
        return FeatureSizes.single(self.feature_size(input_size))


class MLP(nn.Module):
    """The layers that turn an embedding into a box."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise((dim, dim, dim, out_dim)))


class DETR(nn.Module):
    """DETR (Carion et al., https://arxiv.org/abs/2005.12872), with the official checkpoints' names in its `state_dict`.

    Args:
        architecture: The sizes.

    Attributes:
        mean: The mean of each channel with which uint8 pixels are normalised, after division by 255.
        std: The standard deviation of each channel, likewise.
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __init__(self, architecture: Architecture | None = None) -> None:
        super().__init__()
        a = self.architecture = architecture or Architecture()
        positions = (
            LearnedPositionEncoding(a.hidden_dim, a.learned_positions)
            if a.learned_positions
            else SinePositionEncoding(a.hidden_dim)
        )
        self.backbone = nn.Sequential(Backbone(a.block, a.blocks, a.dilation), positions)
        self.input_proj = nn.Conv2d(a.feature_channels, a.hidden_dim, kernel_size=1)
        self.transformer = Transformer(
            a.hidden_dim, a.nheads, a.encoder_layers, a.decoder_layers, a.feedforward_dim, a.pre_norm
        )
        self.query_embed = nn.Embedding(a.num_queries, a.hidden_dim)
        self.class_embed = nn.Linear(a.hidden_dim, a.num_logits)
        self.bbox_embed = MLP(a.hidden_dim, 4)

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that the model can compute."""
        return KEYS

    def forward(
        self,
        pixels: Tensor,
        padding_mask: Tensor | None = None,
        keys: Collection[str] = ("query_embeddings", "pred_logits", "pred_boxes"),
    ) -> dict[str, Tensor]:
        """Compute the tensors that `keys` names, and only what they need.

        Args:
            pixels: `[B, 3, h, w]`, uint8, or floating point and already normalised.
            padding_mask: `[B, h, w]`, True on padding; None if nothing is padded.
            keys: The tensors to return.

        Returns:
            Batch-first tensors: `backbone_features` `[B, C, H, W]`, `encoder_output` `[B, H*W, d]`, `encoder_layers`
            `[B, L, H*W, d]`, `decoder_output` `[B, L, Q, d]`, `query_embeddings` `[B, Q, d]`, `cross_attention`
            `[B, L, Q, H*W]`, averaged over the heads, and in float32 `pred_logits` `[B, Q, num_logits]` and
            `pred_boxes` `[B, Q, 4]`, `cx, cy, w, h` relative to the image without its padding. With a padding mask also
            `padding_mask` `[B, H, W]` at feature size.
        """
        out: dict[str, Tensor] = {}
        backbone, position_encoding = self.backbone
        images = normalise(pixels, padding_mask, self.mean, self.std) if pixels.dtype == torch.uint8 else pixels
        features = backbone(images.to(self.input_proj.weight.dtype))
        if "backbone_features" in keys:
            out["backbone_features"] = features

        visible = None
        if padding_mask is not None:
            padding_mask = F.interpolate(padding_mask[:, None].float(), size=features.shape[-2:])[:, 0].bool()
            visible = ~padding_mask.flatten(1)[:, None, None, :]
            out["padding_mask"] = padding_mask
        if set(keys) <= {"backbone_features"}:
            return out

        position = position_encoding(features, padding_mask)
        tokens = self.input_proj(features).permute(0, 2, 3, 1).flatten(1, 2)  # [B, d, H, W] -> [B, H*W, d]
        encoded = self.transformer.encoder(tokens, position, visible)
        if "encoder_output" in keys:
            out["encoder_output"] = encoded[-1]
        if "encoder_layers" in keys:
            out["encoder_layers"] = torch.stack(encoded, dim=1)
        if set(keys) <= {"backbone_features", "encoder_output", "encoder_layers"}:
            return out

        decoded, attention = self.transformer.decoder(
            self.query_embed.weight, encoded[-1], position, visible, "cross_attention" in keys
        )
        if "decoder_output" in keys:
            out["decoder_output"] = torch.stack(decoded, dim=1)
        if "query_embeddings" in keys:
            out["query_embeddings"] = decoded[-1]
        if "cross_attention" in keys:
            out["cross_attention"] = torch.stack(attention, dim=1)
        if {"pred_logits", "pred_boxes"} & set(keys):
            out["pred_logits"], out["pred_boxes"] = self.predict(decoded[-1])
        return out

    def predict(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the heads to decoder embeddings `[..., d]`, in at least float32.

        Returns:
            Class logits `[..., num_logits]` and boxes `[..., 4]`, `cx, cy, w, h` in `[0, 1]`.
        """
        dtype = torch.promote_types(embeddings.dtype, torch.float32)
        with torch.autocast(embeddings.device.type, enabled=False):
            x = embeddings.to(dtype)
            logits = F.linear(x, self.class_embed.weight.to(dtype), self.class_embed.bias.to(dtype))
            for index, layer in enumerate(cast("list[nn.Linear]", self.bbox_embed.layers)):
                x = F.linear(x.relu() if index else x, layer.weight.to(dtype), layer.bias.to(dtype))
            return logits, x.sigmoid()


def normalise(
    pixels: Tensor,
    padding_mask: Tensor | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Tensor:
    """Normalise uint8 pixels to float32 as in training, with bit-identical results to torchvision's transforms.

    Args:
        pixels: `[B, 3, h, w]`, uint8.
        padding_mask: `[B, h, w]`, True where the result must be zero.
        mean: The mean of each channel, for pixels in `[0, 1]`.
        std: The standard deviation of each channel.
    """
    means, stds = (_channels(values, pixels.device) for values in (mean, std))
    images = pixels.to(torch.float32).div_(255).sub_(means).div_(stds)
    return images if padding_mask is None else images.masked_fill_(padding_mask[:, None], 0)


def _channels(values: Sequence[float], device: torch.device) -> Tensor:
    """Return one number per channel as a float32 tensor `[3, 1, 1]`."""
    if torch.compiler.is_compiling():  # the compiler cannot trace the cache
        return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]
    return _cached_channels(tuple(values), device)


@functools.cache
def _cached_channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    # Made once: a copy to a GPU waits for all work queued there, and a CUDA graph cannot contain one.
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]
