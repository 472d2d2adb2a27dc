"""Hugging Face's DETR: its folder and its hub, its weights, its config and its preprocessing."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from detr_lightning.errors import InputError
from detr_lightning.format.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from detr_lightning.model.image_processor import sides_of
from detr_lightning.model.labels import names_of_config
from detr_lightning.model.state_dicts import from_hugging_face
from detr_lightning.model.weight_files import read_pickled

FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""The files in which a folder may keep its weights, in order of preference."""

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
"""`organisation/name`, or `organisation/name@revision`."""


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
            patterns = ["config.json", "preprocessor_config.json", *weights]
            folder = Path(huggingface_hub.snapshot_download(name, revision=revision or None, allow_patterns=patterns))
            if any((folder / file).is_file() for file in FILES):
                break
    except Exception as error:  # of several libraries, by version
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConnectionError(
            f"model.weights {hub_id!r} is no file or folder here, and Hugging Face's hub did not give it: {reason[0]}"
        ) from error
    return folder


@dataclass(frozen=True)
class Folder:
    """A Hugging Face DETR folder.

    Attributes:
        tensors: Under their official names.
        known: The settings that the config states: `nheads`, `dilation`.
        names: The names of the categories by logit index, if the config has them.
        preprocessing: As `preprocessor_config.json` asks for it; the official preprocessing without that file.
        files: The files of weights.
    """

    tensors: dict[str, Tensor]
    known: dict[str, Any]
    names: dict[int, str] | None
    preprocessing: Preprocessing
    files: list[Path]


def read_folder(folder: Path) -> Folder:
    """Read a Hugging Face DETR folder.

    Raises:
        FileNotFoundError: The folder holds no config or no weights.
        InputError: The config describes a model that is not DETR as published.
    """
    config = read_config(folder)
    try:
        known, names = _facts(config), names_of_config(config)
    except (ValueError, AttributeError) as error:
        raise InputError(f"{folder / 'config.json'}: {error}") from error
    files = weight_files(folder)
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= _read(file)
    return Folder(from_hugging_face(tensors), known, names, _preprocessing(folder), files)


def read_config(folder: Path) -> dict[str, Any]:
    """Return a folder's `config.json`.

    Raises:
        FileNotFoundError: There is none; the message names what the folder seems to hold.
        InputError: It is no JSON object.
    """
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"{folder} has no config.json, so it is no Hugging Face model.{_hint(folder)}")
    return _read_json(config_file)


def _hint(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return " It is an adapter (LoRA) without its base model: merge the two and save the result."
    if checkpoints := sorted(file.parent.name for file in folder.glob("*/config.json")):
        return f" Its subfolder {checkpoints[-1]} has one: name that."
    return " Give a .pth file instead?"


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} holds a {type(content).__name__} and no JSON object.")
    return content


def _preprocessing(folder: Path) -> Preprocessing:
    """Return the sides, mean and std that a folder asks for. The formula and the pixels stay the official ones."""
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return Preprocessing()
    config = _read_json(file)
    try:
        return _sides_and_colours(config)
    except (TypeError, ValueError) as error:
        raise InputError(f"{file}: {error}") from error


def _sides_and_colours(config: dict[str, Any]) -> Preprocessing:
    _require(config, do_resize=True, do_rescale=True)
    if abs(config.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-6:
        raise InputError(f"rescale_factor is {config['rescale_factor']}, and only 1/255 can be used.")
    if config.get("resample", 2) != 2:
        raise InputError(f"resample is {config['resample']}, and only 2 (bilinear) can be used.")
    size = config.get("size", {"shortest_edge": 800, "longest_edge": 1333})
    if isinstance(size, int):
        size = {"shortest_edge": size, "longest_edge": config.get("max_size", 1333)}
    if "shortest_edge" in size and not size.get("longest_edge"):
        size = {**size, "longest_edge": config.get("max_size")}
    sides = sides_of(dict(size))
    if not config.get("do_normalize", True):
        return Preprocessing(**sides, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    mean, std = (
        tuple(float(value) for value in config.get(name, default))
        for name, default in (("image_mean", IMAGENET_MEAN), ("image_std", IMAGENET_STD))
    )
    if len(mean) != 3 or len(std) != 3 or not all(value > 0 for value in std):
        raise InputError(
            f"image_mean is {list(mean)} and image_std {list(std)}; three of each are needed, std above 0."
        )
    return Preprocessing(**sides, mean=mean, std=std)


def _facts(config: dict[str, Any]) -> dict[str, Any]:
    """Return the heads and the dilation that a config states, and refuse what this DETR does not compute."""
    heads, dilation = config.get("encoder_attention_heads", 8), config.get("dilation", False)
    _require({"model_type": None} | config, model_type="detr")
    _require(config, activation_function="relu", decoder_attention_heads=heads)
    if config.get("position_embedding_type", "sine") not in ("sine", "learned"):
        _require(config, position_embedding_type="sine")
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


def weight_files(folder: Path) -> list[Path]:
    """Return a folder's files of weights.

    Raises:
        FileNotFoundError: There are none, or one of several is missing.
    """
    for name in FILES:
        file = folder / name
        if file.is_file() and name.endswith(".index.json"):
            shards = [folder / Path(shard).name for shard in sorted(set(_read_json(file)["weight_map"].values()))]
            if gone := [shard.name for shard in shards if not shard.is_file()]:
                raise FileNotFoundError(f"{file} names {gone[0]}, which is not there. Was the download cut off?")
            return shards
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
