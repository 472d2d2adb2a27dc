"""Hugging Face's DETR: hub downloads, folders, weights, configs and preprocessing."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from detr_lightning.errors import InputError, MissingPackageError
from detr_lightning.format.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from detr_lightning.model.image_processor import PROCESSOR_FILES, sides_of
from detr_lightning.model.labels import names_of_config
from detr_lightning.model.state_dicts import from_hugging_face
from detr_lightning.model.weight_files import first_line, read_pickled

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""The names of a folder's weight files, in order of preference."""

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
"""`organisation/name`, or `organisation/name@revision`."""


def from_hub(hub_id: str) -> Path:
    """Download a model's config and weights into Hugging Face's cache, and return the folder.

    Args:
        hub_id: `organisation/name`, or `organisation/name@revision`.

    Raises:
        MissingPackageError: `huggingface_hub` is not installed.
        ConnectionError: The model could not be downloaded, and is not in the cache.
    """
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise MissingPackageError(
            f"model.weights {hub_id!r} is not a local file or folder, and downloading it from Hugging Face's hub needs "
            "`pip install huggingface_hub`."
        ) from None
    name, _, revision = hub_id.partition("@")
    folder = Path()
    try:
        for weights in (["model*.safetensors", WEIGHT_FILES[1]], ["pytorch_model*.bin", WEIGHT_FILES[3]]):
            patterns = ["config.json", *PROCESSOR_FILES, *weights]
            folder = Path(huggingface_hub.snapshot_download(name, revision=revision or None, allow_patterns=patterns))
            if any((folder / file).is_file() for file in WEIGHT_FILES):
                break
    except Exception as error:  # of several libraries, by version
        raise ConnectionError(
            f"model.weights {hub_id!r} is not a local file or folder, and Hugging Face's hub did not provide it: "
            f"{first_line(error)}"
        ) from error
    return folder


@dataclass(frozen=True)
class Folder:
    """The content of a Hugging Face DETR folder.

    Attributes:
        tensors: The tensors under their official names.
        known: The settings that the config states: `nheads`, `dilation`.
        names: The names of the categories by logit index, if the config has them.
        preprocessing: The settings of `preprocessor_config.json`; without that file, the official ones.
        files: The weight files.
    """

    tensors: dict[str, Tensor]
    known: dict[str, Any]
    names: dict[int, str] | None
    preprocessing: Preprocessing
    files: list[Path]


def read_folder(folder: Path) -> Folder:
    """Read a Hugging Face DETR folder.

    Raises:
        FileNotFoundError: The folder has no config or no weights.
        InputError: The config describes a model that is not DETR as published, or a file cannot be read.
    """
    config = read_config(folder)
    try:
        known, names = _known_settings(config), names_of_config(config)
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
        FileNotFoundError: It does not exist; the message suggests what to give instead.
        InputError: It is not a JSON object.
    """
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"{folder} has no config.json, so it is not a Hugging Face model.{_hint(folder)}")
    return _read_json(config_file)


def _hint(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return " It is an adapter (LoRA) without its base model: merge the two and save the result."
    if checkpoints := sorted(file.parent.name for file in folder.glob("*/config.json")):
        return f" Its subfolder {checkpoints[-1]} has one: give that folder."
    return " Give a .pth file instead?"


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file}: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} contains a {type(content).__name__}, but must be a JSON object.")
    return content


def _preprocessing(folder: Path) -> Preprocessing:
    """Return a folder's sides, mean and std. Everything else follows the official preprocessing."""
    file = next((folder / name for name in PROCESSOR_FILES if (folder / name).is_file()), None)
    if file is None:
        return Preprocessing()
    config = _read_json(file)
    config = config.get("image_processor", config)
    try:
        return _sides_and_colours(config)
    except TypeError as error:
        raise InputError(f"{file}: a value has the wrong type ({error}).") from error
    except ValueError as error:
        raise InputError(f"{file}: {error}") from error


def _sides_and_colours(config: dict[str, Any]) -> Preprocessing:
    _require(config, do_resize=True, do_rescale=True)
    if abs(config.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-6:
        raise InputError(f"rescale_factor is {config['rescale_factor']}, but only 1/255 is supported.")
    if config.get("resample", 2) != 2:
        raise InputError(f"resample is {config['resample']}, but only 2 (bilinear) is supported.")
    _require(config, pad_size=None)
    size = config.get("size") or {"shortest_edge": 800, "longest_edge": 1333}
    if not isinstance(size, int | dict):
        raise InputError(f"size is {size!r}, but must be height and width, or shortest_edge with longest_edge.")
    if isinstance(size, int):
        size = {"shortest_edge": size, "longest_edge": config.get("max_size", 1333)}
    if "shortest_edge" in size and not size.get("longest_edge"):
        size = {**size, "longest_edge": config.get("max_size")}
    sides = sides_of(dict(size))
    if not config.get("do_normalize", True):
        return Preprocessing(**sides, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    mean, std = (
        tuple(float(value) for value in config.get(name) or default)
        for name, default in (("image_mean", IMAGENET_MEAN), ("image_std", IMAGENET_STD))
    )
    if len(mean) != 3 or len(std) != 3 or not all(value > 0 for value in std):
        raise InputError(
            f"image_mean is {list(mean)} and image_std is {list(std)}, but both need three values, and std above 0."
        )
    return Preprocessing(**sides, mean=mean, std=std)


def _known_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return the number of heads and the dilation in a config, and refuse models that this DETR does not implement."""
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
        raise InputError(f"backbone is {name!r}, but only plain ResNets are supported.")
    # If there is a backbone_config, Transformers ignores dilation.
    before = {"output_stride": 16 if dilation else 32} | (config.get("backbone_kwargs") or {})
    stride = (body or before).get("output_stride") or 32
    if stride not in (16, 32) or (dilation and stride == 32):
        raise InputError(
            f"output_stride is {stride} and dilation is {dilation}, but only 32, or 16 with dilation, is supported."
        )
    return {"nheads": heads, "dilation": stride == 16}


def _require(settings: dict[str, Any], **allowed: Any) -> None:
    for key, value in allowed.items():
        if settings.get(key, value) != value:
            raise InputError(f"{key} is {settings[key]!r}, but only {value!r} is supported.")


def weight_files(folder: Path) -> list[Path]:
    """Return a folder's weight files.

    Raises:
        FileNotFoundError: The folder has none, or one of several is missing.
        InputError: The index of several files cannot be read.
    """
    for name in WEIGHT_FILES:
        file = folder / name
        if file.is_file() and name.endswith(".index.json"):
            weight_map = _read_json(file).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
                raise InputError(f"{file} has no weight_map that names a file for each tensor. Download it again.")
            shards = [folder / Path(shard).name for shard in sorted(set(weight_map.values()))]
            if missing := [shard.name for shard in shards if not shard.is_file()]:
                raise FileNotFoundError(f"{file} lists {missing[0]}, which does not exist. Was the download cut off?")
            return shards
        if file.is_file():
            return [file]
    raise FileNotFoundError(f"{folder} has a config.json but no weights. Expected one of {', '.join(WEIGHT_FILES)}.")


def _read(file: Path) -> dict[str, Tensor]:
    if file.suffix != ".safetensors":
        content = read_pickled(file)
        if not isinstance(content, Mapping):
            raise InputError(f"{file} contains a {type(content).__name__}, but must contain a state_dict.")
        return {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
    import safetensors.torch

    try:
        return safetensors.torch.load_file(file)
    except safetensors.SafetensorError as error:
        raise InputError(f"{file} is not a complete safetensors file: {error}.") from error
