"""Loads a model with its weights from a name, a file or a folder.

Official checkpoints load strictly, without renaming. The sizes of a DETR are read from its tensors. The number of heads
and the dilation, which tensors do not show, are looked up if they are known, and never guessed silently.
"""

from __future__ import annotations

import hashlib
import math
import re
from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detr_lightning.errors import InputError, SettingError, check_choice
from detr_lightning.format.preprocessing import Preprocessing
from detr_lightning.model.checkpoint import Checkpoint
from detr_lightning.model.detr import hugging_face
from detr_lightning.model.detr.detr import DETR, Architecture
from detr_lightning.model.detr.official import OFFICIAL, Official, fetch
from detr_lightning.model.detr.sizes import check_sizes, read_sizes
from detr_lightning.model.family_folder import load_folder
from detr_lightning.model.labels import coco_ids
from detr_lightning.model.state_dicts import find_detr
from detr_lightning.model.weight_checks import COUNTER, refuse_misfits, refuse_non_finite
from detr_lightning.model.weight_files import read_pickled, sha256_of

__all__ = ["OFFICIAL", "RANDOM", "Checkpoint", "load"]

RANDOM = "random"
SEED = 0
"""The seed of `random` weights."""


def load(
    weights: str,
    nheads: int | None = None,
    dilation: bool | None = None,
    ema: bool | None = None,
    plan_only: bool = False,
) -> Checkpoint:
    """Find weights, read the architecture from them, and build the model.

    Args:
        weights: An official name, a file in the official layout or with Hugging Face's names, a folder in transformers'
            layout, a hub id (`organisation/name` or `organisation/name@revision`), or `random` (always the same).
        nheads: The number of attention heads; None takes the known number for these weights, else 8.
        dilation: Whether the last stage is dilated (DC5); None takes the known value for these weights, else false.
        ema: Whether to take a file's averaged (EMA) weights; None takes them if the file has no others.
        plan_only: Whether to build an official model on the meta device, without its weights, instead of downloading.

    Raises:
        FileNotFoundError: The file does not exist, or the folder lacks one.
        ConnectionError: Weights could not be downloaded.
        ImportError: transformers or huggingface_hub is needed, but not installed.
        InputError: The weights cannot be read or do not fit their model, or a setting contradicts them.
        SettingError: The name is unknown, or a setting does not apply to this kind of weights.
    """
    if weights == RANDOM:
        return _random(nheads, dilation)
    official = OFFICIAL.get(weights)
    if plan_only and official and not ema and official.cached_sha256() is None:
        return _without_weights(weights, official, nheads, dilation)
    folder = _folder(weights)
    if folder is not None and (model_type := hugging_face.read_config(folder[0]).get("model_type")) != "detr":
        if any(value is not None for value in (nheads, dilation, ema)):
            raise SettingError("model.nheads, model.dilation and model.ema work only with DETR. Leave them out.")
        return load_folder(*folder, str(model_type))
    source = _from_file(weights, ema) if folder is None else _from_folder(*folder, ema)
    architecture, notes = _settled(source, read_sizes(source.name, source.tensors), nheads, dilation)
    # Copied, since the file may be memory-mapped, and replaced while the model is in use.
    tensors = {key: tensor.to(torch.float32, copy=True) for key, tensor in source.tensors.items()}
    model = _fill(source.name, architecture, tensors)
    names = source.names
    if folder is not None and names and max(names) >= architecture.num_logits:
        raise InputError(
            f"{source.name} names categories up to the number {max(names)}, but its weights "
            f"have {architecture.num_logits} logits. Correct id2label in its config.json."
        )
    if names:
        names = {index: name for index, name in names.items() if index < architecture.num_logits - 1}
    model.mean, model.std = source.preprocessing.mean, source.preprocessing.std
    return Checkpoint(
        model,
        source.name,
        source.sha256,
        ", ".join([notes, *source.remarks]),
        source.preprocessing,
        names,
        coco_ids(names, architecture.num_logits - 1),
    )


@dataclass(frozen=True)
class _Source:
    """Tensors in the official layout, with the known settings of the model and their origin."""

    name: str
    sha256: str
    tensors: dict[str, Tensor]
    known: dict[str, Any] = field(default_factory=dict)
    known_from: str = ""
    names: dict[int, str] | None = None
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    remarks: tuple[str, ...] = ()


def _folder(weights: str) -> tuple[Path, str] | None:
    """Return a Hugging Face folder, downloaded from the hub if needed, and its name; None for a weight file.

    Raises:
        FileNotFoundError: The file or folder does not exist.
        ConnectionError: The folder could not be downloaded.
        SettingError: `weights` is not a valid name, path or hub id.
    """
    path = Path(weights).expanduser()
    if weights in OFFICIAL or path.is_file():
        return None
    if weights and path.is_dir():
        return path, path.resolve().name
    if path.suffix in (".pth", ".pt", ".bin", ".safetensors", ".ckpt") or re.match(r"[/~.]", weights):
        raise FileNotFoundError(f"model.weights: the file or folder {weights!r} does not exist.")
    if not hugging_face.HUB_ID.fullmatch(weights):
        check_choice("model.weights", weights, [*OFFICIAL, RANDOM, "a .pth file", "a Hugging Face folder or hub id"])
    return hugging_face.from_hub(weights), weights


def _from_folder(path: Path, name: str, ema: bool | None) -> _Source:
    """Read a Hugging Face DETR folder."""
    if ema is not None:
        raise SettingError("model.ema works only with a weight file, not with a folder or hub id. Leave it out.")
    folder = hugging_face.read_folder(path)
    return _Source(
        name,
        sha256_of(folder.files),
        folder.tensors,
        folder.known,
        "from its config.json",
        folder.names,
        folder.preprocessing,
    )


def _from_file(weights: str, ema: bool | None) -> _Source:
    """Read a local weight file, or an official one."""
    path = Path(weights).expanduser()
    official = OFFICIAL.get(weights)
    known_from = "official"
    if official:
        name = weights
        path, sha256 = fetch(official)
    else:
        name, sha256 = path.name, sha256_of([path])
        official = next((o for o in OFFICIAL.values() if sha256.startswith(o.sha256_prefix)), None)
        known_from = "known by its sha256" if official else "from its args"
    tensors, known, remark = _read_file(path, ema)
    if ema:
        sha256 = hashlib.sha256(f"{sha256} ema".encode()).hexdigest()  # not the hash of the file's other weights
    return _Source(
        name,
        sha256,
        tensors,
        official.known if official else known,
        known_from,
        official.category_names if official else None,
        remarks=(remark,) if remark else (),
    )


def _read_file(path: Path, averaged: bool | None) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Return a file's tensors under their official names, the settings it states, and a remark on averaged weights."""
    if path.suffix == ".safetensors":
        raise InputError(f"{path} does not describe its model. Give the folder with its config.json instead.")
    content = read_pickled(path)
    tensors, remark = find_detr(str(path), content, averaged)
    stated = _stated(content, ("hyper_parameters", "args"))
    known: dict[str, Any] = {}
    if type(stated.get("nheads")) is int:
        known["nheads"] = stated["nheads"]
    if isinstance(dilation := stated.get("dilation"), int) and dilation in (0, 1):  # or a bool, which is an int
        known["dilation"] = bool(dilation)
    return tensors, known, remark


def _stated(content: Mapping[str, Any], names: Iterable[str], depth: int = 3) -> dict[str, Any]:
    """Return the settings that a checkpoint keeps under these names, or in groups within them, `depth` levels deep."""
    stated: dict[str, Any] = {}
    for name in names:
        group = content.get(name)
        group = vars(group) if isinstance(group, Namespace) else group
        if isinstance(group, dict) and depth:
            stated |= _stated(group, ("model", "config", "args"), depth - 1) | group
    return stated


def _settled(
    source: _Source, sizes: Architecture, nheads: int | None, dilation: bool | None
) -> tuple[Architecture, str]:
    """Return the architecture with the settings that tensors do not show, and their origin for the user."""
    heads, heads_from = _settle(source, "nheads", nheads, sizes.nheads)
    dilated, dilated_from = _settle(source, "dilation", dilation, False)
    architecture = check_sizes(replace(sizes, nheads=heads, dilation=dilated))
    settings = f"{heads} heads ({heads_from}), {'' if dilated else 'not '}dilated ({dilated_from})"
    return architecture, f"{architecture.name}: {settings}"


def _settle(source: _Source, setting: str, given: Any, default: Any) -> tuple[Any, str]:
    """Return a setting's value, and its origin for the user."""
    known = source.known.get(setting)
    if known is None:
        return (default, "the default: not stated in the file") if given is None else (given, "as given")
    if given is not None and given != known:
        raise InputError(
            f"model.{setting} is {given!r}, but {source.name} has {setting} {known!r} ({source.known_from}). "
            f"Leave model.{setting} out."
        )
    return known, source.known_from


def _fill(name: str, architecture: Architecture, tensors: Mapping[str, Tensor]) -> DETR:
    """Build a model from tensors, without initialising it first."""
    with torch.device("meta"):
        model = DETR(architecture)
    expected = model.state_dict()
    tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith(COUNTER)}
    wrong = [f"{key} is missing" for key in expected if key not in tensors]
    wrong += [
        f"{key} is {list(tensor.shape)}, not {list(expected[key].shape)}" if key in expected else f"{key} is unknown"
        for key, tensor in tensors.items()
        if key not in expected or tensor.shape != expected[key].shape
    ]
    refuse_misfits(name, f"a {architecture.name}", wrong)
    refuse_non_finite(name, tensors)
    model.load_state_dict(tensors, assign=True)
    return model.eval().requires_grad_(False)


def _without_weights(weights: str, official: Official, nheads: int | None, dilation: bool | None) -> Checkpoint:
    """Build an official model whose weights have not been downloaded, with only its shapes."""
    source = _Source(weights, "", {}, official.known, "official")
    architecture, notes = _settled(source, official.architecture, nheads, dilation)
    with torch.device("meta"):
        model = DETR(architecture).eval().requires_grad_(False)
    names = official.category_names
    notes += f". Its weights are not on this machine: a run downloads {official.url} first"
    return Checkpoint(
        model, weights, "", notes, category_names=names, category_ids=coco_ids(names, architecture.num_logits - 1)
    )


def _random(nheads: int | None, dilation: bool | None) -> Checkpoint:
    """Build the official DETR-R50 with random weights that are always the same.

    The weights preserve the variance of activations and keep attention sharp. With the usual initialisation and no
    training, all queries would have nearly equal embeddings.
    """
    heads = Architecture.nheads if nheads is None else nheads
    architecture = check_sizes(Architecture(nheads=heads, dilation=bool(dilation)))
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in DETR(architecture).state_dict().items()}
    generator = torch.Generator().manual_seed(SEED)  # leaves the global generator to the user
    digest = hashlib.sha256()
    tensors = {}
    for key, shape in shapes.items():
        if len(shape) > 1:
            gain = 16 if key.endswith("in_proj_weight") else 0.02 if key.endswith("out_proj.weight") else 1
            bound = math.sqrt(3 * gain / (1 if key == "query_embed.weight" else shape[1:].numel()))
            tensors[key] = torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator)
        else:
            tensors[key] = torch.full(shape, float(key.endswith(("weight", "running_var"))), device="cpu")
        digest.update(tensors[key].numpy().data)
    notes = f"{architecture.name}: random weights (seed {SEED}), {heads} heads"
    model = _fill(RANDOM, architecture, tensors)
    return Checkpoint(
        model, RANDOM, digest.hexdigest(), notes, category_ids=coco_ids(None, architecture.num_logits - 1)
    )
