"""What the command accepts, and how it says what it does not."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn

# Read when jsonargparse is first imported: LightningCLI itself uses what jsonargparse deprecates.
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

import yaml
from lightning.pytorch.cli import LightningArgumentParser

from detr_lightning import shipped
from detr_lightning.errors import SettingError

LINKS = {"extract_type": "model.extract_type", "output_dir": "writer.output_dir"}
"""Top-level keys, and the settings they stand for."""


class CommandError(SettingError):
    """A command line or configuration that cannot be run."""


class CommandParser(LightningArgumentParser):
    """A parser that says what is wrong in a line or two."""

    names: ClassVar[set[str]] = set()
    """All settings of all subcommands."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what was wrong, with the nearest name that would be right.

        Raises:
            CommandError: Always.
        """
        text = _plain(" ".join(str(ex or message).split()))
        for target in LINKS.values():
            if target in text:
                raise CommandError(_linked(target))
        unknown = re.search(r"(?:[Uu]nrecognized arguments: --|[Oo]ption '|[Kk]ey ')([\w.]+)", text)
        if unknown and unknown[1] in self.names:
            text += ". Settings, --config among them, come after predict or validate"
        elif unknown:
            near = difflib.get_close_matches(unknown[1], self.names, n=1)
            text += f". Did you mean {near[0]!r}?" if near else ""
        raise CommandError(text)


def with_config_files(words: Sequence[str]) -> list[str]:
    """Return the words of a command line with its configs first, so that flags override them wherever they stand.

    The path of each config takes the place of its name, and its content is checked.

    Raises:
        SettingError: There is no such config, or its content cannot be used.
    """
    configs: list[str] = []
    others: list[str] = []
    rest = iter(words)
    for word in rest:
        flag, equals, value = word.partition("=")
        if flag not in ("-c", "--config"):
            others.append(word)
            continue
        name = value if equals else next(rest, None)
        if name is None:
            raise CommandError("--config needs the name of a config or a YAML file.")
        path = shipped.config_file(name)
        check_config(path)
        configs.append(f"--config={path}")
    return [*others[:1], *configs, *others[1:]]


def check_config(path: Path) -> None:
    """Refuse a file that is not YAML with settings, or sets one that a top-level key would overwrite in silence.

    Raises:
        CommandError: The file, and what is wrong with it.
    """
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CommandError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise CommandError(f"{path} holds no settings. Expected keys such as 'data:' or 'output_dir:'.")
    for target in LINKS.values():
        group, key = target.split(".")
        if isinstance(settings.get(group), dict) and key in settings[group]:
            raise CommandError(f"{path}: {_linked(target)}")


def _plain(text: str) -> str:
    """Say what jsonargparse says of types in the words of the command line."""
    wrong = re.search(r'Parser key "(.+?)": .*?Subtypes: \[(.*)\] Errors: .* Given value: (.*)', text)
    wrong = wrong or re.search(r'Parser key "(.+?)": Expected an? (.*)\. Got value: (.*)', text)
    if wrong and "." not in re.sub(r"typing\.", "", wrong[2]):  # of a class it says more
        allowed = re.sub(r"<class '(\w+)'>", r"\1", wrong[2]).replace("NoneType", "null")
        allowed = re.sub(r"list\[(\w+)\]", r"a list such as '[a, b]' (of \1)", allowed).replace("typing.Literal", "")
        text = f"{wrong[1]} is {wrong[3]!r}, but must be one of: {allowed}"
    return re.sub(r"(required: |Key \")(predict|validate)\.", r"\1--", text)


def _linked(target: str) -> str:
    source = next(source for source, linked in LINKS.items() if linked == target)
    return f"{target} is set by its top-level key: use {source} (--{source}) instead."
