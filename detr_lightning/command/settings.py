"""The settings of `predict` and `validate`, parsed from the source code of the classes that they configure.

Importing Lightning takes seconds. Neither the help nor an error about a misspelled setting should wait for it.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from detr_lightning import shipped
from detr_lightning.command.verbs import VERBS

PACKAGE = Path(__file__).resolve().parents[1]

GROUPS = {
    "data": ("data/datamodule.py", "COCODataModule"),
    "model": ("extractor.py", "DETRExtractor"),
    "writer": ("extraction/writer.py", "EmbeddingWriter"),
}
"""The groups of settings, each with the file and class whose `__init__` defines them."""

GROUPS_OF = {"predict": ("data", "model", "writer"), "validate": ("data", "model")}
"""The groups that a verb uses."""

LINKS = {"extract_type": "model.extract_type", "output_dir": "writer.output_dir", "dry_run": "model.plan_only"}
"""Top-level keys, and the settings that they set."""

TITLES = {"data": "Images:", "model": "Model:", "writer": "Files:"}


class Setting(NamedTuple):
    """One setting.

    Attributes:
        name: The full name, such as `data.limit`.
        kind: The placeholder for its value in the help; empty for a switch, which has no value.
        default: The default as a Python expression; empty if the setting is required.
        help: The description.
    """

    name: str
    kind: str
    default: str
    help: str

    @property
    def usage(self) -> str:
        """The flag, the placeholder for its value, and the default."""
        usage = f"--{self.name} {self.kind}".rstrip()
        if not self.default:
            return f"{usage}  (required)"
        shown = {"True": "true", "False": "false"}.get(self.default, self.default.strip("'"))
        return usage if shown == "None" or not self.kind else f"{usage}  (default: {shown})"


_CONFIG = Setting(
    "config",
    "NAME|FILE",
    "None",
    f"A YAML file with settings; flags override them. Available by name: {', '.join(shipped.config_names())}.",
)
_SLOW = Setting(
    "allow_slow_precision",
    "",
    "False",
    "Compute in bfloat16 on a processor without instructions for it, about ten times slower than 32-true.",
)

TOP = {
    "predict": (
        _CONFIG,
        Setting(
            "extract_type",
            "TYPE",
            "'decoder'",
            "decoder: decoder_output, query_embeddings and encoder_output; encoder: encoder_output; backbone: "
            "backbone_features; all: all of these. Each also includes pred_logits and pred_boxes.",
        ),
        Setting("output_dir", "FOLDER", "'./embeddings_output'", "The folder to write to. It is created if missing."),
        Setting("dry_run", "", "False", "Print the plan and stop, without downloading official weights."),
        _SLOW,
    ),
    "validate": (_CONFIG, Setting("output", "FILE.json", "None", "Also write the numbers to this file."), _SLOW),
}
"""The settings that are not in a group."""


def settings(group: str) -> Iterator[Setting]:
    """Yield the settings of a group in the order of the signature, except those set by a top-level key."""
    if group == "trainer":
        spec = importlib.util.find_spec("lightning")  # without importing it
        folders = (spec.submodule_search_locations if spec else None) or [""]
        file, name = Path(folders[0]) / "pytorch" / "trainer" / "trainer.py", "Trainer"
    else:
        relative, name = GROUPS[group]
        file = PACKAGE / relative
    tree = ast.parse(file.read_text(encoding="utf-8"))
    defined = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    init = next(node for node in defined.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    texts = _described(ast.get_docstring(init) or ast.get_docstring(defined) or "")
    arguments = [*init.args.args[1:], *init.args.kwonlyargs]
    given = [*init.args.defaults, *init.args.kw_defaults]
    defaults = ["" if value is None else ast.unparse(value) for value in given]
    defaults = [""] * (len(arguments) - len(defaults)) + defaults
    for argument, default in zip(arguments, defaults, strict=True):
        full = f"{group}.{argument.arg}"
        if full not in LINKS.values():
            kind = _kind("" if argument.annotation is None else ast.unparse(argument.annotation))
            yield Setting(full, kind, default, texts.get(argument.arg, ""))


def _kind(annotation: str) -> str:
    kinds = {"list": "'[A,B,...]'", "bool": "true|false", "int": "N", "float": "X"}
    return next((kind for name, kind in kinds.items() if annotation.lower().startswith(name)), "VALUE")


def _described(docstring: str) -> dict[str, str]:
    """Return the descriptions under `Args:` of a Google-style docstring."""
    _, _, rest = docstring.partition("\nArgs:\n")
    texts: dict[str, str] = {}
    name = ""
    for line in rest.splitlines():
        if line and not line.startswith(" "):
            break
        if line.startswith("    ") and line[4:5].strip():
            name, _, text = line.strip().partition(":")
            texts[name] = text.strip()
        elif name and line.strip():
            texts[name] += f" {line.strip()}"
    return texts


@functools.cache
def names(verb: str) -> frozenset[str]:
    """Return the names of all settings of a verb, except `trainer.*`."""
    grouped = (setting for group in GROUPS_OF[verb] for setting in settings(group))
    return frozenset(setting.name for setting in (*TOP[verb], *grouped))


@functools.cache
def trainer_names() -> frozenset[str]:
    """Return the names of Lightning's own settings; empty if its source cannot be parsed as expected."""
    try:
        return frozenset(setting.name for setting in settings("trainer"))
    except (OSError, StopIteration, RuntimeError):
        return frozenset()


def help_of(verb: str) -> str:
    """Return the help of a verb, wrapped to the width of the terminal."""
    described = VERBS[verb]
    examples = (described.example, *described.more)
    lines = [
        f"usage: detr-lightning {verb} [--config NAME|FILE] [--SETTING VALUE ...]",
        "",
        *_wrap(f"{described.help[0].upper()}{described.help[1:]}.", 0),
        "",
        "Examples:",
        *(f"  detr-lightning {verb} {example}" for example in examples),
        "",
        *_listed(TOP[verb]),
    ]
    for group in GROUPS_OF[verb]:
        lines += ["", TITLES[group], *_listed(settings(group))]
    end = (
        "--trainer.* are Lightning's, such as --trainer.devices, --trainer.precision and --trainer.strategy; "
        "--help_trainer lists them. YAML files use the same names: 'data: {limit: 10}' is --data.limit 10."
    )
    return "\n".join([*lines, "", *_wrap(end, 0)])


def help_of_trainer() -> str:
    """Return the help of Lightning's own settings."""
    return "\n".join(["Settings of Lightning's Trainer:", *_listed(settings("trainer"))])


def _listed(members: Iterator[Setting] | tuple[Setting, ...]) -> Iterator[str]:
    for setting in members:
        yield f"  {setting.usage}"
        yield from _wrap(setting.help, 6)


def _wrap(text: str, indent: int) -> list[str]:
    width = max(50, min(100, shutil.get_terminal_size().columns))
    plain = text.replace("`", "")
    space = " " * indent
    return textwrap.wrap(plain, width, initial_indent=space, subsequent_indent=space, break_on_hyphens=False)
