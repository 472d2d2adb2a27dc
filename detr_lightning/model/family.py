"""The other detectors of the DETR family, computed by the networks of transformers."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from detr_lightning.errors import InputError, SettingError
from detr_lightning.format.keys import KEYS, FeatureSizes, ModelShape, Size
from detr_lightning.model.detr.transformer import replace_linears
from detr_lightning.model.family_hooks import watching
from detr_lightning.model.fold_norms import fold_norms
from detr_lightning.model.unused_layers import drop_unused_layers


@dataclass(frozen=True)
class ModelType:
    """The properties in which the types of models differ.

    Attributes:
        scoring: `softmax`, where the last logit is "no object", or `sigmoid`.
        encoder: Whether a transformer encoder runs over all features, so that `encoder_layers` exist.
        dense: Whether the decoder attends to every feature, so that `cross_attention` exists.
    """

    scoring: str = "sigmoid"
    encoder: bool = False
    dense: bool = False


MODEL_TYPES = {
    "table-transformer": ModelType("softmax", encoder=True, dense=True),
    "conditional_detr": ModelType(encoder=True, dense=True),
    "dab-detr": ModelType(encoder=True, dense=True),
    "deformable_detr": ModelType(encoder=True),
    "rt_detr": ModelType(),
    "rt_detr_v2": ModelType(),
    "d_fine": ModelType(),
    "deimv2": ModelType(),
    "rf_detr": ModelType(),
    "lw_detr": ModelType(),
}
"""The types of models, by transformers' `model_type`."""


PROBE = (256, 256)
"""Height and width of the image that a model is probed with if sizes vary: divisible by every stride."""


@dataclass(frozen=True)
class FamilyArchitecture:
    """The sizes of a model, found by running it once.

    Attributes:
        model_type: The type, as transformers names it.
        shape: The sizes that the shapes of the tensors depend on.
        probed: Height and width of the image that the model was run on.
        features: The sizes of that image's feature maps.
    """

    model_type: str
    shape: ModelShape
    probed: Size
    features: FeatureSizes

    @property
    def name(self) -> str:
        """The name shown to users."""
        return self.model_type

    @property
    def num_logits(self) -> int:
        """The number of class logits."""
        return self.shape.num_logits

    def to_json(self) -> dict[str, Any]:
        """Return the type and the sizes as the metadata records them."""
        return {"model_type": self.model_type, **vars(self.shape)}

    def feature_sizes(self, input_size: Size) -> FeatureSizes:
        """Return the sizes of an image's feature maps, for an input of this height and width."""
        if input_size == self.probed:
            return self.features

        def scaled(size: Size) -> Size:
            height, width = (
                _strided(side, probed, found) for side, probed, found in zip(input_size, self.probed, size, strict=True)
            )
            return height, width

        return FeatureSizes(tuple(map(scaled, self.features.levels)), scaled(self.features.backbone))


def _strided(side: int, probed: int, found: int) -> int:
    """Return a feature map's side for an input's side, rounded up."""
    return -(-side // (probed // found))


class FamilyDetector(nn.Module):
    """A detector of transformers that returns its embeddings under this package's keys.

    Args:
        model: An `...ForObjectDetection` model of transformers.
        input_size: Height and width of every image; None if sizes vary.
    """

    def __init__(self, model: nn.Module, input_size: Size | None = None) -> None:
        super().__init__()
        self.model: Any = model.eval().requires_grad_(False)
        self.input_size = input_size

    @property
    def kind(self) -> ModelType:
        """The properties of the model's type."""
        return MODEL_TYPES[self.model.config.model_type]

    @property
    def probed(self) -> Size:
        """Height and width of the image that the model is probed with."""
        return self.input_size or PROBE

    @cached_property
    def architecture(self) -> FamilyArchitecture:
        """The model's sizes, found by running it once."""
        size = self.probed
        image = torch.zeros(1, 3, *size, dtype=self.model.dtype, device=self.model.device)
        with torch.inference_mode():
            out, levels = self._run(image, ("backbone_features", "encoder_output", "decoder_output", "pred_logits"))
        backbone = out["backbone_features"]
        _, layers, queries, width = out["decoder_output"].shape
        shape = ModelShape(
            feature_channels=backbone.shape[1],
            hidden_dim=width,
            encoder_layers=len(self._encoder_layers) if self.kind.encoder else 0,
            decoder_layers=layers,
            num_queries=queries,
            num_logits=out["pred_logits"].shape[-1],
        )
        height, width = backbone.shape[-2:]
        features = FeatureSizes(levels or ((height, width),), (height, width))
        return FamilyArchitecture(self.model.config.model_type, shape, size, features)

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that the model can compute."""
        has = {"cross_attention": self.kind.dense, "encoder_layers": self.kind.encoder}
        return tuple(key for key in KEYS if has.get(key, True))

    def for_inference(self, dtype: torch.dtype | None = None) -> FamilyDetector:
        """Return a faster copy for inference, whose results are the same up to rounding."""
        model = copy.deepcopy(self.model)
        if dtype:
            model.to(dtype)
        model = replace_linears(fold_norms(drop_unused_layers(model))).to(memory_format=torch.channels_last)
        copied = FamilyDetector(model, self.input_size)
        copied.__dict__["architecture"] = self.architecture  # found once
        return copied

    def forward(
        self,
        pixels: Tensor,
        padding_mask: Tensor | None = None,
        keys: Collection[str] = ("query_embeddings", "pred_logits", "pred_boxes"),
    ) -> dict[str, Tensor]:
        """Compute the tensors that `keys` names.

        Args:
            pixels: `[B, 3, h, w]`, as the model's image processor makes them.
            padding_mask: Must be None.
            keys: The tensors to return.

        Returns:
            Batch-first tensors, as for `DETR.forward`; `H*W` is the sum over all levels.

        Raises:
            SettingError: A padding mask was given, or `pixels` are not floating point.
            InputError: The feature maps have other sizes than planned.
        """
        if padding_mask is not None:
            raise SettingError("data.batching padded works only with DETR. Leave it out.")
        if not pixels.is_floating_point():
            raise SettingError(
                f"{self.model.config.model_type} takes the pixels of its image processor, not {pixels.dtype}."
            )
        pixels = pixels.to(self.model.dtype, memory_format=torch.channels_last)
        out, levels = self._run(pixels, keys)
        size = (pixels.shape[-2], pixels.shape[-1])
        planned = self.architecture.feature_sizes(size).levels
        if levels and levels != planned:
            raise InputError(f"An input of {size} has feature maps of {levels}, but {planned} were expected.")
        return out

    @property
    def _encoder_layers(self) -> nn.ModuleList:
        layers: nn.ModuleList = self.model.model.encoder.layers
        return layers

    def _run(self, pixels: Tensor, keys: Collection[str]) -> tuple[dict[str, Tensor], tuple[Size, ...]]:
        """Return the tensors and the sizes of the levels; the sizes are empty if the model has a single level."""
        inner = self.model.model
        attentions = "cross_attention" in keys
        if attentions and self.model.config._attn_implementation != "eager":
            self.model.set_attn_implementation("eager")  # others do not return the attention weights
        with watching(inner, self.kind.encoder and "encoder_layers" in keys) as seen:
            found = self.model(pixel_values=pixels, **({"output_attentions": True} if attentions else {}))
        decoder_norm = getattr(inner.decoder, "layernorm", None) or nn.Identity()
        decoded = [decoder_norm(x) for x in seen.decoder]
        out: dict[str, Tensor] = {
            "backbone_features": seen.backbone[0],
            "encoder_output": seen.memory[0],
            "query_embeddings": decoded[-1],
            "pred_logits": found.logits.float() if found.logits.dtype != torch.float64 else found.logits,
            "pred_boxes": found.pred_boxes.float() if found.pred_boxes.dtype != torch.float64 else found.pred_boxes,
        }
        if "decoder_output" in keys:
            out["decoder_output"] = torch.stack(decoded, dim=1)
        if "encoder_layers" in keys:
            encoder_norm = getattr(inner.encoder, "layernorm", None) or nn.Identity()
            out["encoder_layers"] = torch.stack([encoder_norm(x) for x in seen.encoder], dim=1)
        if attentions:
            out["cross_attention"] = torch.stack([weights.mean(1) for weights in found.cross_attentions], dim=1)
        return {key: out[key] for key in out if key in keys}, seen.levels
