"""Checks of the command line of `predict` and `validate`, before Lightning is imported."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from detr_lightning import shipped
from detr_lightning.command.settings import GROUPS, LINKS, names, trainer_names
from detr_lightning.errors import SettingError, did_you_mean

LIGHTNING_KEYS = ("trainer", "seed_everything", "print_config")
"""Top-level keys that Lightning checks."""


def checked_words(verb: str, words: Sequence[str]) -> list[str]:
    """Check the arguments after the verb, and return them in the form that Lightning's parser expects.

    Configs come first, as paths, so that flags override them in any order. `--extract_type`, or the `extract_type` of a
    later config, overrides the `model.keys` of a config.

    Raises:
        SettingError: A setting is misspelled, missing or in the wrong place, or a config cannot be used.
    """
    configs: list[str] = []
    flags: list[str] = []
    chosen: list[str] = []  # extract_type or model.keys, for each config that sets one, in order
    images_named = False
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if name in ("-c", "--config"):
            source = value if equals else next(rest, None)
            if source is None:
                raise SettingError("--config needs the name of a config or a YAML file.")
            path = shipped.config_file(source)
            content = _read_config(verb, path)
            chosen += _tensor_settings(content, path)
            images_named |= "image_dir" in (content.get("data") or ())
            configs.append(f"--config={path}")
        else:
            if name.startswith("--"):
                _check_name(verb, name[2:].rstrip("+"), "", flag=True)
            flags.append(word)
    given = {word.partition("=")[0] for word in flags}
    by_flag = given & {"--extract_type", "--model.keys"}
    if len(by_flag) == 2:
        raise SettingError("--extract_type and --model.keys both choose the tensors. Give one of them.")
    if not (images_named or given & {"--data", "--data.image_dir", "--print_config"}):
        raise SettingError(
            f"data.image_dir is required: the folder with the images, as in detr-lightning {verb} --data.image_dir "
            f"photos. To try it without your own images: detr-lightning {verb} --config demo"
        )
    if "model.keys" in chosen and (by_flag == {"--extract_type"} or (not by_flag and chosen[-1] == "extract_type")):
        flags.append("--model.keys=null")
    return [*configs, *flags]


def _read_config(verb: str, path: Path) -> dict[str, Any]:
    """Return the settings in a config, after checking their names."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise SettingError(f"{path} contains no settings. Expected keys such as 'data:' or 'output_dir:'.")
    for key, value in content.items():
        if key not in (*GROUPS, "trainer"):
            _check_name(verb, str(key), f"{path}: ")
        else:
            if value is not None and not isinstance(value, dict):
                first = {"data": "image_dir", "model": "weights", "writer": "dtype", "trainer": "devices"}[key]
                raise SettingError(
                    f"{path}: {key} is {value!r}, but it is a group of settings, as in '{key}: {{{first}: {value}}}'."
                )
            for name in value or ():
                _check_name(verb, f"{key}.{name}", f"{path}: ")
    return content


def _tensor_settings(content: Mapping[str, Any], path: Path) -> list[str]:
    """Return the name of the setting in a config that chooses the tensors, in a list of at most one."""
    model = content.get("model") or {}
    given = {"extract_type": "extract_type" in content, "model.keys": model.get("keys") is not None}
    chosen = [name for name, is_given in given.items() if is_given]
    if len(chosen) == 2:
        raise SettingError(f"{path}: extract_type and model.keys both choose the tensors. Remove one of them.")
    return chosen


def _check_name(verb: str, name: str, where: str, flag: bool = False) -> None:
    """Raise SettingError for a setting that does not exist, and for a flag that only the other verb has."""
    for source, target in LINKS.items():
        if name == target:
            raise SettingError(f"{where}{target} is set by its top-level key: use {source} (--{source}) instead.")
    if name in names(verb) or name in (*GROUPS, *LIGHTNING_KEYS):
        return
    group, _, rest = name.partition(".")
    if group == "trainer" and (not trainer_names() or f"trainer.{rest.partition('.')[0]}" in trainer_names()):
        return
    if name in names("predict") | names("validate"):
        # One config serves both verbs.
        if flag:
            other = "predict" if verb == "validate" else "validate"
            reason = "validate writes no embeddings" if other == "predict" else "predict computes no metrics"
            raise SettingError(f"--{name} is for {other}: {reason}.")
        return
    hint = _nearest(name, names(verb) | trainer_names())
    dashes = "--" if flag else ""
    raise SettingError(f"{where}There is no setting {dashes}{name}.{hint} detr-lightning {verb} --help lists them.")


def _nearest(name: str, allowed: Iterable[str]) -> str:
    # `limit` without its group also suggests `data.limit`.
    by_last = {setting.rpartition(".")[2]: setting for setting in allowed}
    near = difflib.get_close_matches(name, by_last, n=1)
    return did_you_mean(name, allowed) or (f" Did you mean {by_last[near[0]]!r}?" if near else "")
