"""Small random models of transformers' detectors, and what they compute on their way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

RESNET = {"embedding_size": 8, "hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 1, 1], "layer_type": "basic"}
PLAIN = {
    "d_model": 32,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_queries": 9,
    "auxiliary_loss": False,
}
HYBRID = {
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [12, 16, 24],
    "feat_strides": [8, 16, 32],
    "encoder_layers": 1,
    "encoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "d_model": 32,
    "num_queries": 9,
    "decoder_in_channels": [32, 32, 32],
    "decoder_ffn_dim": 48,
    "decoder_layers": 3,
    "decoder_attention_heads": 4,
    "num_denoising": 0,
    "hidden_expansion": 0.5,
}
HGNET = {
    "model_type": "hgnet_v2",
    "stem_channels": [3, 8, 8],
    "stage_in_channels": [8, 12, 12, 16],
    "stage_mid_channels": [8, 8, 8, 8],
    "stage_out_channels": [12, 12, 16, 24],
    "stage_num_blocks": [1, 1, 1, 1],
    "stage_downsample": [False, True, True, True],
    "stage_light_block": [False, False, True, True],
    "stage_kernel_size": [3, 3, 5, 5],
    "stage_numb_of_layers": [2, 2, 2, 2],
    "embedding_size": 8,
    "hidden_sizes": [12, 12, 16, 24],
    "depths": [1, 1, 1, 1],
    "out_features": ["stage2", "stage3", "stage4"],
}
LABELS = {0: "cat", 1: "dog", 2: "hamster", 3: "tortoise", 4: "canary"}
SQUARE = (128, 128)
SIDES = {"shortest_edge": 96, "longest_edge": 160}

MODELS: dict[str, str] = {
    "table-transformer": "TableTransformer",
    "conditional_detr": "ConditionalDetr",
    "dab-detr": "DabDetr",
    "deformable_detr": "DeformableDetr",
    "rt_detr": "RTDetr",
    "rt_detr_v2": "RTDetrV2",
    "d_fine": "DFine",
    "deimv2": "Deimv2",
    "rf_detr": "RfDetr",
    "lw_detr": "LwDetr",
}


def config_of(model_type: str, **changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    resnet = transformers.ResNetConfig(**RESNET, out_features=["stage4"])
    labels = {"id2label": LABELS, "label2id": {name: number for number, name in LABELS.items()}}
    settings: dict[str, Any]
    if model_type in ("table-transformer", "conditional_detr"):
        settings = {**PLAIN, "backbone_config": resnet, "use_timm_backbone": False}
    elif model_type == "dab-detr":
        settings = {key: value for key, value in PLAIN.items() if key != "d_model"}
        settings |= {"hidden_size": 32, "backbone_config": resnet, "use_timm_backbone": False}
    elif model_type == "deformable_detr":
        levels = transformers.ResNetConfig(**RESNET, out_features=["stage2", "stage3", "stage4"])
        settings = {**PLAIN, "backbone_config": levels, "use_timm_backbone": False, "num_feature_levels": 4}
    elif model_type in ("rt_detr", "rt_detr_v2"):
        body = transformers.RTDetrResNetConfig(**RESNET, out_features=["stage2", "stage3", "stage4"])
        settings = {**HYBRID, "backbone_config": body}
    elif model_type in ("d_fine", "deimv2"):
        settings = {**HYBRID, "backbone_config": dict(HGNET), "decoder_n_points": [3, 6, 3]}
    elif model_type == "rf_detr":
        settings = {
            "backbone_config": {
                "model_type": "rf_detr_dinov2",
                "hidden_size": 24,
                "num_hidden_layers": 3,  # Nothing reads the last one.
                "num_attention_heads": 2,
                "mlp_ratio": 2,
                "image_size": 128,
                "patch_size": 16,
                "num_windows": 2,
                "out_features": ["stage1", "stage2"],
            },
            "d_model": 32,
            "decoder_layers": 3,
            "decoder_self_attention_heads": 4,
            "decoder_cross_attention_heads": 4,
            "decoder_ffn_dim": 48,
            "num_queries": 9,
            "group_detr": 2,
        }
    else:
        settings = {
            "backbone_config": {
                "model_type": "lw_detr_vit",
                "hidden_size": 24,
                "num_hidden_layers": 3,  # Nothing reads the last one.
                "num_attention_heads": 2,
                "mlp_ratio": 2,
                "image_size": 128,
                "pretrain_image_size": 128,
                "patch_size": 16,
                "num_windows": 4,
                "window_block_indices": [0],
                "out_features": ["stage1", "stage2"],
                "cae_beta": None,
            },
            "d_model": 32,
            "decoder_layers": 3,
            "decoder_self_attention_heads": 4,
            "decoder_cross_attention_heads": 4,
            "decoder_ffn_dim": 48,
            "num_queries": 9,
            "group_detr": 2,
            "projector_scale_factors": [1.0],
        }
    return getattr(transformers, f"{MODELS[model_type]}Config")(**{**settings, **labels, **changes})


def build(model_type: str, **changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{MODELS[model_type]}ForObjectDetection")(config_of(model_type, **changes))
    return scrambled(model.eval().requires_grad_(False))


def scrambled(model: Any) -> Any:
    """Give every tensor a value of its own, none at an identity, and the scores of two-stage models far apart."""
    generator = torch.Generator().manual_seed(7)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point() or name.endswith(("anchors", "project", "up", "reg_scale")):
            continue
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2, generator=generator)
        elif tensor.dim() == 1 and name.endswith("weight"):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.dim() == 1:
            tensor.normal_(0, 0.05, generator=generator)
        elif "embed" in name and tensor.dim() == 2 and "bbox" not in name and "class" not in name:
            tensor.normal_(0, 1, generator=generator)
        elif tensor.numel():
            gain = 3 if "score_head" in name or "enc_out_class" in name or "class_embed" in name else 1
            tensor.normal_(0, gain * tensor[0].numel() ** -0.5, generator=generator)
    return model


def reference_outputs(model: Any, images: Tensor) -> dict[str, Tensor]:
    """Run transformers' model by itself and collect, under our names, what it computes on its way."""
    inner = model.model
    seen: dict[str, Any] = {}
    body = inner.conv_encoder.model if model.config.model_type == "deimv2" else inner.backbone
    hooks = [
        body.register_forward_hook(lambda _m, _a, out: seen.__setitem__("backbone", out)),
        inner.decoder.register_forward_pre_hook(
            lambda _m, _a, kwargs: seen.__setitem__("memory", kwargs["encoder_hidden_states"]), with_kwargs=True
        ),
    ]
    with torch.no_grad():
        out = model(pixel_values=images)
    for hook in hooks:
        hook.remove()
    backbone = seen["backbone"]
    if model.config.model_type == "rf_detr":
        backbone = backbone[0]
    elif model.config.model_type == "deimv2":
        backbone = backbone.feature_maps[-1]
    else:
        backbone = (backbone[0] if model.config.model_type in ("table-transformer", "dab-detr") else backbone)[-1][0]
    return {
        "backbone_features": backbone,
        "encoder_output": seen["memory"],
        "decoder_output": decoder_states(model, images),
        "query_embeddings": out.last_hidden_state,
        "pred_logits": out.logits,
        "pred_boxes": out.pred_boxes,
    }


def decoder_states(model: Any, images: Tensor) -> Tensor:
    """Return each decoder layer's output as the heads read it, `[B, L, Q, d]`, from what transformers returns."""
    with torch.no_grad():
        states = model.model(pixel_values=images).get("intermediate_hidden_states")
    if states is None:
        return ending_after_each(model.model.decoder, lambda: model.model(pixel_values=images).last_hidden_state)
    return states if len(states) == len(images) != model.config.decoder_layers else states.transpose(0, 1)


def encoder_states(model: Any, images: Tensor) -> Tensor:
    """Return each encoder layer's output as the decoder would read it, `[B, L, N, d]`."""
    settings = {"pixel_values": images, "output_hidden_states": True}
    return ending_after_each(model.model.encoder, lambda: model.model(**settings).encoder_last_hidden_state)


def ending_after_each(part: Any, run: Callable[[], Tensor]) -> Tensor:
    """Return what a model returns if its encoder or decoder ends after the first, the second, ... layer."""
    layers, states = part.layers, []
    with torch.no_grad():
        for number in range(1, len(layers) + 1):
            part.layers = layers[:number]
            states.append(run())
    part.layers = layers
    return torch.stack(states, dim=1)


def attention_of_each_layer(model: Any, images: Tensor) -> Tensor:
    """Return what each decoder layer's cross-attention computes, averaged over heads, `[B, L, Q, N]`."""
    model.set_attn_implementation("eager")  # others do not return weights
    seen: list[Tensor] = []
    layers = model.model.decoder.layers
    modules = [layer.cross_attn.cross_attn if hasattr(layer, "cross_attn") else layer.encoder_attn for layer in layers]
    hooks = [module.register_forward_hook(lambda _m, _a, out: seen.append(out[1])) for module in modules]
    with torch.no_grad():
        model.model(pixel_values=images, output_attentions=True)
    for hook in hooks:
        hook.remove()
    return torch.stack([sum(weights.unbind(1)) / weights.shape[1] for weights in seen], dim=1)


def level_maps(model: Any, images: Tensor) -> list[Tensor]:
    """Return the feature maps that the decoder of an RT-DETR or its kin reads, each `[B, d, H, W]`, before they are
    put after each other.
    """
    with torch.no_grad():
        maps = model(pixel_values=images).encoder_last_hidden_state
        return [project(one) for project, one in zip(model.model.decoder_input_proj, maps, strict=True)]


def last_head(model: Any) -> Any:
    """Return the layer that makes logits of the last decoder layer's states."""
    head = getattr(model, "class_labels_classifier", None) or getattr(model, "class_embed", None)
    head = head if head is not None else model.model.decoder.class_embed
    return head[-1] if isinstance(head, torch.nn.ModuleList) else head


def save(model: Any, folder: Path, size: dict[str, int] | None = None) -> Path:
    """Save a model with an image processor as it belongs to its type."""
    transformers = pytest.importorskip("transformers")
    model_type = model.config.model_type
    model.save_pretrained(folder)
    if model_type in ("rt_detr", "rt_detr_v2", "d_fine", "deimv2"):
        processor = transformers.RTDetrImageProcessor(size=size or {"height": SQUARE[0], "width": SQUARE[1]})
    elif model_type == "rf_detr":
        processor = transformers.RfDetrImageProcessor(size=size or {"height": SQUARE[0], "width": SQUARE[1]})
    else:
        sides = {"height": SQUARE[0], "width": SQUARE[1]} if model_type == "lw_detr" else SIDES
        kind = {"conditional_detr": "ConditionalDetr", "deformable_detr": "DeformableDetr", "lw_detr": "DeformableDetr"}
        name = f"{kind.get(model_type, 'Detr')}ImageProcessor"
        processor = getattr(transformers, name)(size=size or sides)
    processor.save_pretrained(folder)
    return folder
