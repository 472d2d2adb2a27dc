"""Hugging Face's DETR: its folder and its hub, its names and its config, turned into the official layout."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detr_lightning.errors import InputError
from detr_lightning.model.labels import names_of_config
from detr_lightning.model.weight_files import read_pickled

FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Where a folder may keep its weights, in order of preference."""

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
"""`organisation/name`, or `organisation/name@revision`."""

# Applied in this order. Both spellings of a name occur: what is on disk, and what Transformers 5 has in memory.
BODY_NAMES = (
    (r"^backbone\.(conv_encoder\.)?model\.", "backbone.0.body."),
    (r"body\.embedder\.embedder\.convolution", "body.conv1"),
    (r"body\.embedder\.embedder\.normalization", "body.bn1"),
    (r"\.shortcut\.convolution", ".downsample.0"),
    (r"\.shortcut\.normalization", ".downsample.1"),
)
NAMES = (
    (r"^(encoder|decoder)\.", r"transformer.\1."),
    (r"decoder\.layernorm\.", "decoder.norm."),
    (r"\.self_attn_layer_norm\.", ".norm1."),
    (r"\.encoder_attn_layer_norm\.", ".norm2."),
    (r"(encoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm2."),
    (r"(decoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm3."),
    (r"\.encoder_attn\.", ".multihead_attn."),
    (r"\.o_proj\.", ".out_proj."),
    (r"\.(mlp\.)?fc([12])\.", r".linear\2."),
    (r"^input_projection\.", "input_proj."),
    (r"^query_position_embeddings\.", "query_embed."),
    (r"^class_labels_classifier\.", "class_embed."),
    (r"^bbox_predictor\.", "bbox_embed."),
)


def from_hub(hub_id: str) -> Path:
    """Download a model's config and weights into Hugging Face's cache and return the folder.

    Args:
        hub_id: `organisation/name`, or `organisation/name@revision`.

    Raises:
        ModuleNotFoundError: `huggingface_hub` is not installed.
        ConnectionError: The hub did not give it, and the cache does not hold it.
    """
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"model.weights {hub_id!r} is no file or folder here, and to fetch it from Hugging Face's hub needs "
            "`pip install huggingface_hub`."
        ) from None
    name, _, revision = hub_id.partition("@")
    folder = Path()
    try:
        for weights in (["model*.safetensors", FILES[1]], ["pytorch_model*.bin", FILES[3]]):
            patterns = ["config.json", *weights]
            folder = Path(huggingface_hub.snapshot_download(name, revision=revision or None, allow_patterns=patterns))
            if any((folder / file).is_file() for file in FILES):
                break
    except Exception as error:  # of several libraries, by version
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConnectionError(
            f"model.weights {hub_id!r} is no file or folder here, and Hugging Face's hub did not give it: {reason[0]}"
        ) from error
    return folder


def read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[int, str] | None, list[Path]]:
    """Read a Hugging Face DETR folder.

    Returns:
        The tensors under their official names, what the config tells (`nheads`, `dilation`), the names of the
        categories by logit index if it has them, and the files of weights.

    Raises:
        FileNotFoundError: The folder holds no config or no weights.
        ValueError: The config describes a model that is not DETR as published.
    """
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(
            f"{folder} has no config.json, so it is no Hugging Face model. Give a .pth file instead?"
        )
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        known, names = _facts(config), names_of_config(config)
    except (ValueError, AttributeError) as error:
        raise InputError(f"{config_file}: {error}") from error
    files = _weight_files(folder)
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= _read(file)
    return to_official(tensors), known, names, files


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
        if parts.keys() == set("qkv"):  # else it stays missing, and is named so
            official[target] = torch.cat([parts[third] for third in "qkv"])
    return official


def _official_name(name: str) -> str:
    name = re.sub(r"^(detr\.)?(model\.)?", "", name)
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


def _facts(config: dict[str, Any]) -> dict[str, Any]:
    """Return the heads and the dilation that a config states, and refuse what this DETR does not compute."""
    heads, dilation = config.get("encoder_attention_heads", 8), config.get("dilation", False)
    _require({"model_type": None} | config, model_type="detr")
    _require(config, activation_function="relu", position_embedding_type="sine", decoder_attention_heads=heads)
    body = config.get("backbone_config") or {}
    kind = body.get("model_type") or ("timm_backbone" if config.get("use_timm_backbone", True) else "resnet")
    if kind == "resnet":
        _require(body, hidden_act="relu", downsample_in_first_stage=False, downsample_in_bottleneck=False)
        _require(config, dilation=False)  # Transformers' own ResNet ignores it
        return {"nheads": heads, "dilation": False}

    _require({"backbone_config.model_type": kind}, **{"backbone_config.model_type": "timm_backbone"})
    name = body.get("backbone") or config.get("backbone") or "resnet50"
    if not re.fullmatch(r"(tv_)?resnet\d+(\..*)?", name):
        raise InputError(f"backbone is {name!r}, and only plain ResNets can be read.")
    # Where there is a backbone_config, Transformers does not look at dilation any more.
    before = {"output_stride": 16 if dilation else 32} | (config.get("backbone_kwargs") or {})
    stride = (body or before).get("output_stride") or 32
    if stride not in (16, 32) or (dilation and stride == 32):
        raise InputError(
            f"output_stride is {stride} and dilation {dilation}. Only 32, or 16 with dilation, can be read."
        )
    return {"nheads": heads, "dilation": stride == 16}


def _require(settings: dict[str, Any], **allowed: Any) -> None:
    for key, value in allowed.items():
        if settings.get(key, value) != value:
            raise InputError(f"{key} is {settings[key]!r}, and only {value!r} can be read.")


def _weight_files(folder: Path) -> list[Path]:
    for name in FILES:
        file = folder / name
        if file.is_file() and name.endswith(".index.json"):
            shards = json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()
            return [folder / Path(shard).name for shard in sorted(set(shards))]
        if file.is_file():
            return [file]
    raise FileNotFoundError(f"{folder} has a config.json and no weights. Expected one of {', '.join(FILES)}.")


def _read(file: Path) -> dict[str, Tensor]:
    if file.suffix != ".safetensors":
        content = read_pickled(file)
        if not isinstance(content, Mapping):
            raise InputError(f"{file} holds a {type(content).__name__} and not a state_dict.")
        return {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
    import safetensors.torch

    try:
        return safetensors.torch.load_file(file)
    except safetensors.SafetensorError as error:
        raise InputError(f"{file} is no whole safetensors file: {error}.") from error
