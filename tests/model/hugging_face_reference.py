"""An independent DETR to compare with: Hugging Face's, with weights that sit at no identity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

TINY = {
    "d_model": 32,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_queries": 9,
    "num_labels": 5,
}
BASIC = {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512], "depths": [1, 2, 1, 1]}
BOTTLENECK = {"layer_type": "bottleneck", "hidden_sizes": [256, 512, 1024, 2048], "depths": [3, 4, 6, 3]}

# What is not said is as in the official DETR-R50: 256 wide, 8 heads, 6 + 6 layers, 100 queries, 91 labels.
REFERENCES: dict[str, dict[str, Any]] = {
    "r18": {"backbone": "resnet18", **TINY},
    "r50": {"backbone": "resnet50", "num_labels": 91},
    "r50-dc5": {"backbone": "resnet50", "dilation": True, **TINY},
    "r101": {"backbone": "resnet101", **TINY},
    "r50-no-timm": {"body": BOTTLENECK, **TINY},
    "small-no-timm": {"body": BASIC, **TINY},
    "learned": {"body": BASIC, **TINY, "position_embedding_type": "learned"},
    "pre-norm": {"kind": "TableTransformer", "body": BASIC, **TINY},
}


# Sharp attention; tokens that keep what is their own; queries that take up what they attend to.
GAINS = {"q_proj": 4, "k_proj": 4, "encoder_attn.o": 3, "self_attn.o": 0.3}


def hugging_face_detr(body: dict[str, Any] | None = None, kind: str = "Detr", **settings: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    if body:
        body = transformers.ResNetConfig(embedding_size=64, out_features=["stage4"], **body)
        settings |= {"use_timm_backbone": False, "backbone_config": body}
    else:
        pytest.importorskip("timm")
        settings |= {"use_timm_backbone": True, "use_pretrained_backbone": False}
    config = getattr(transformers, f"{kind}Config")(**settings, attn_implementation="eager")
    return getattr(transformers, f"{kind}ForObjectDetection")(config).eval().requires_grad_(False)


def scrambled(model: Any) -> Any:
    """Give every tensor a value of its own, attention peaks, and the object queries different fates."""
    generator = torch.Generator().manual_seed(7)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2, generator=generator)
        elif tensor.dim() == 1 and name.endswith("weight"):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.dim() == 1:
            tensor.normal_(0, 0.05, generator=generator)
        elif "query_position_embeddings" in name:
            tensor.normal_(0, 2, generator=generator)
        else:
            gain = next((gain for part, gain in GAINS.items() if part in name), 1)
            tensor.normal_(0, gain * tensor[0].numel() ** -0.5, generator=generator)
    return model


def reference_outputs(model: Any, images: Tensor, padding_mask: Tensor | None = None) -> dict[str, Tensor]:
    """Run Hugging Face's DETR and collect, under our names, what it computes on its way."""
    seen: dict[str, list[Any]] = {}
    hooks = [
        module.register_forward_hook(lambda _module, _args, output, kind=kind: seen.setdefault(kind, []).append(output))
        for kind, modules in {
            "backbone": [model.model.backbone],
            "encoder": model.model.encoder.layers,
            "decoder": model.model.decoder.layers,
            "attention": [layer.encoder_attn for layer in model.model.decoder.layers],
        }.items()
        for module in modules
    ]
    visible = torch.ones(images.shape[0], *images.shape[2:]) if padding_mask is None else ~padding_mask
    with torch.no_grad():
        out = model(pixel_values=images, pixel_mask=visible.long(), output_attentions=True)
    for hook in hooks:
        hook.remove()
    encoder, decoder = ([o[0] if isinstance(o, tuple) else o for o in seen[kind]] for kind in ("encoder", "decoder"))
    encoder = [getattr(model.model.encoder, "layernorm", torch.nn.Identity())(x) for x in encoder]
    backbone = seen["backbone"][0]
    if model.config.model_type == "table-transformer":  # beside its features it returns positions
        backbone = backbone[0]
    return {
        "backbone_features": backbone[-1][0],
        "encoder_output": out.encoder_last_hidden_state,
        "encoder_layers": torch.stack(encoder, dim=1),
        "decoder_output": torch.stack([model.model.decoder.layernorm(x) for x in decoder], dim=1),
        "query_embeddings": out.last_hidden_state,
        "pred_logits": out.logits,
        "pred_boxes": out.pred_boxes,
        "cross_attention": torch.stack([weights.mean(1) for _, weights in seen["attention"]], dim=1),
    }
