"""Finds a DETR in a checkpoint, below containers and prefixes, and gives its tensors their official names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from detr_lightning.errors import InputError
from detr_lightning.model.detr.hugging_face_names import to_official

CONTAINERS = ("model", "state_dict", "model_state_dict", "model_state", "network", "net", "weights")
AVERAGED = ("ema", "model_ema", "ema_model", "ema_state_dict", "state_dict_ema", "ema_weights", "averaged_model")
"""Keys under which training scripts keep the model's weights, and their exponential moving average (EMA)."""

COUNT_OF_AVERAGED = "n_averaged"
"""A tensor that `torch.optim.swa_utils.AveragedModel` adds to those of the model."""

OFFICIAL_MARK = "query_embed.weight"
HUGGING_FACE_MARK = "query_position_embeddings.weight"
"""A tensor that every DETR has, in each of the two layouts. Anything before this name is a prefix."""

WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:(?:_orig_mod|module)\.)+")
"""Prefixes that `torch.compile` and parallel wrappers add to names."""

KINDS = {
    r"lora_[AB]\.": "a LoRA adapter without its base model; merge the two and save the result",
    r"(^|\.)linear_class\.weight": "the small DETR of the paper's notebook, which is a different network",
    r"(^|\.)(bbox_head|rpn_head)\.": "an MMDetection model",
    r"(^|\.)roi_heads?\.": "a Faster R-CNN or a relative",
    r"^model\.\d+\.": "an Ultralytics YOLO",
    r"(^|\.)(enc_score_head|denoising_class_embed)\b": "an RT-DETR or a D-FINE",
    r"(^|\.)backbone\.0\.encoder\.": "an RF-DETR or an LW-DETR",
    r"ca_qcontent_proj": "a Conditional DETR or a relative",
    r"refpoint_embed|refpoint_embeddings": "a DAB-DETR or a relative",
    r"sampling_offsets|level_embed": "a Deformable DETR or a relative",
    r"^(body\.|backbone\.|resnet\.|module\.)?(layer1\.0\.conv1|conv1)\.weight": "only a backbone",
}
"""Other models, by patterns that match the names of their tensors."""


def find_detr(name: str, content: Any, averaged: bool | None = None) -> tuple[dict[str, Tensor], str]:
    """Find a DETR's tensors in the content of a checkpoint file.

    Args:
        name: The file, for messages.
        content: The unpickled object.
        averaged: Whether to take the averaged (EMA) weights; None takes them only if there are no others.

    Returns:
        The tensors under their official names, and a remark on averaged weights for the user, empty if there are none.

    Raises:
        InputError: The file contains another model or no tensors, or lacks the weights that `averaged` asks for.
    """
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        raise InputError(f"{name} contains a {kind}. Expected {{'model': state_dict}} or a state_dict.")
    own, ema = _candidates(content)
    if not own and not ema:
        raise InputError(
            f"{name} contains no tensors. Its keys: {_first_keys(content)}. "
            "Expected {'model': state_dict} or a state_dict."
        )
    where = next(iter(ema), None)
    if averaged and where is None:
        raise InputError(f"{name} has no averaged (EMA) weights. Leave model.ema out.")
    if averaged is False and not own:
        raise InputError(f"{name} has only averaged (EMA) weights, in {where!r}. Leave model.ema out.")
    if where is not None and (averaged or not own):
        return _official(name, ema[where]), f"EMA weights from {where!r}{'' if own else ', the only ones'}"
    remark = "" if where is None else f"not the EMA weights in {where!r} (model.ema=true)"
    return _official(name, next(iter(own.values()))), remark


def taken_for(names: Iterable[str]) -> str | None:
    """Return the other model that tensors of these names belong to, or None if there is no known one."""
    names = list(names)
    return next((kind for pattern, kind in KINDS.items() if any(re.search(pattern, name) for name in names)), None)


def _candidates(content: Mapping[Any, Any]) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
    """Return the state_dicts of the model and of its average by location, each with the likeliest first."""
    own = {key: tensors for key in CONTAINERS if (tensors := _tensors(content.get(key)))}
    ema = {key: tensors for key in AVERAGED if (tensors := _tensors(content.get(key)))}
    if not own and not ema and (tensors := _tensors(content)):
        own = {"the file": tensors}
    # One state_dict may hold both, as a LightningModule's does.
    for where, tensors in list(own.items()):
        averages = tuple(f"{key}." for key in AVERAGED)
        for root in [*_roots(tensors, OFFICIAL_MARK), *_roots(tensors, HUGGING_FACE_MARK)]:
            if set(root.split(".")) & set(AVERAGED):
                prefix = root.removesuffix("model.")
                ema.setdefault(root.rstrip("."), _below(tensors, prefix))
                averages += (prefix,)
        own[where] = {name: tensor for name, tensor in tensors.items() if not name.startswith(averages)}
        if not own[where]:
            del own[where]
    return own, ema


def _tensors(value: Any) -> dict[str, Tensor]:
    """Return the tensors of a state_dict, or of one nested in it."""
    if not isinstance(value, Mapping):
        return {}
    named = {k: v for k, v in value.items() if isinstance(k, str) and isinstance(v, Tensor)}
    found = {WRAPPERS.sub("", k): v for k, v in named.items() if k.rpartition(".")[2] != COUNT_OF_AVERAGED}
    inner = (value.get(key) for key in ("module", *CONTAINERS))
    return found or next((tensors for part in inner if (tensors := _tensors(part))), {})


def _official(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a DETR's tensors under their official names.

    Raises:
        InputError: They are another model's.
    """
    if kind := taken_for(tensors):
        raise InputError(
            f"{name} looks like {kind}: it has the tensor {_matching_name(tensors)}. "
            "Only a DETR is read from a .pth or .ckpt file; other detectors from a folder in transformers' layout."
        )
    roots = _roots(tensors, OFFICIAL_MARK)
    if len(roots) > 1:
        raise InputError(
            f"{name} contains several DETRs, with the prefixes {', '.join(map(repr, roots))}. "
            "Save the one to use in a file without the others."
        )
    if roots:
        return _below(tensors, roots[0])
    return from_hugging_face(tensors) if _roots(tensors, HUGGING_FACE_MARK) else tensors


def from_hugging_face(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give a DETR's tensors their official names; transformers, or training with it, saved them."""
    tensors = {WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    roots = _roots(tensors, HUGGING_FACE_MARK)
    return to_official(_below(tensors, roots[0].removesuffix("model.") if roots else ""))


def _matching_name(tensors: Mapping[str, Tensor]) -> str:
    return next(name for pattern in KINDS for name in tensors if re.search(pattern, name))


def _roots(tensors: Iterable[str], mark: str) -> list[str]:
    """Return the prefixes of the DETRs in a state_dict, the shortest first."""
    roots = (name.removesuffix(mark) for name in tensors if name.endswith(mark))
    return sorted((root for root in roots if not root or root.endswith(".")), key=len)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _first_keys(content: Mapping[Any, Any]) -> str:
    return ", ".join(map(repr, list(content)[:6])) or "none"
