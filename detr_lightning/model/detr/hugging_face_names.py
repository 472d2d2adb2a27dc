"""Renaming of the tensors of Hugging Face's DETR to their official names."""

from __future__ import annotations

import re

import torch
from torch import Tensor

# Applied in this order. Some names have two forms: the one on disk, and that of Transformers 5 in memory.
BODY_NAMES = (
    (r"^backbone\.(conv_encoder\.)?model\.", "backbone.0.body."),
    (r"body\.embedder\.embedder\.convolution", "body.conv1"),
    (r"body\.embedder\.embedder\.normalization", "body.bn1"),
    (r"\.shortcut\.convolution", ".downsample.0"),
    (r"\.shortcut\.normalization", ".downsample.1"),
)
NAMES = (
    (r"^(encoder|decoder)\.", r"transformer.\1."),
    (r"(encoder|decoder)\.layernorm\.", r"\1.norm."),
    (r"\.self_attn_layer_norm\.", ".norm1."),
    (r"\.encoder_attn_layer_norm\.", ".norm2."),
    (r"(encoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm2."),
    (r"(decoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm3."),
    (r"\.encoder_attn\.", ".multihead_attn."),
    (r"\.o_proj\.", ".out_proj."),
    (r"\.(mlp\.)?fc([12])\.", r".linear\2."),
    (r"^input_projection\.", "input_proj."),
    (r"^position_embedding\.row_embeddings\.", "backbone.1.row_embed."),
    (r"^position_embedding\.column_embeddings\.", "backbone.1.col_embed."),
    (r"^query_position_embeddings\.", "query_embed."),
    (r"^class_labels_classifier\.", "class_embed."),
    (r"^bbox_predictor\.", "bbox_embed."),
)


def to_official(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a Hugging Face `state_dict` and stack its query, key and value projections."""
    official: dict[str, Tensor] = {}
    thirds: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        target = _official_name(name)
        if match := re.fullmatch(r"(.*_attn)\.([qkv])_proj\.(weight|bias)", target):
            thirds.setdefault(f"{match[1]}.in_proj_{match[3]}", {})[match[2]] = tensor
        else:
            official[target] = tensor
    for target, parts in thirds.items():
        if parts.keys() == set("qkv"):  # else it is reported as missing
            official[target] = torch.cat([parts[third] for third in "qkv"])
    return official


def _official_name(name: str) -> str:
    name = re.sub(r"^(detr\.)?(model\.)?", "", name)
    name = name.replace("backbone.position_embedding.", "position_embedding.")  # before Transformers 5
    if not name.startswith("backbone."):
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        return name
    for pattern, replacement in BODY_NAMES:
        name = re.sub(pattern, replacement, name)
    if match := re.fullmatch(r"(.*\.)encoder\.stages\.(\d+)\.layers\.(\d+)\.(.*)", name):
        name = f"{match[1]}layer{int(match[2]) + 1}.{match[3]}.{match[4]}"
    if match := re.fullmatch(r"(.*\.)layer\.(\d+)\.(convolution|normalization)\.(.*)", name):
        kind = "conv" if match[3] == "convolution" else "bn"
        name = f"{match[1]}{kind}{int(match[2]) + 1}.{match[4]}"
    return name
