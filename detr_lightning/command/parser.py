"""LightningCLI's parser, with shorter error messages."""

from __future__ import annotations

import os
import re
from typing import Any, NoReturn

# jsonargparse reads this on import. LightningCLI itself uses deprecated features of jsonargparse.
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

from lightning.pytorch.cli import LightningArgumentParser

from detr_lightning.errors import SettingError


class CommandError(SettingError):
    """A command line or configuration that cannot be run."""


class CommandParser(LightningArgumentParser):
    """A parser that raises errors with short messages."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the error.

        Raises:
            CommandError: Always.
        """
        raise CommandError(_plain(" ".join(str(ex or message).split())))


def _plain(text: str) -> str:
    """Return jsonargparse's message about a wrong type, reworded for the command line."""
    wrong = re.search(r'Parser key "(.+?)": .*?Subtypes: \[(.*)\] Errors: .* Given value: (.*)', text)
    wrong = wrong or re.search(r'Parser key "(.+?)": Expected an? (.*)\. Got value: (.*)', text)
    if wrong and "." not in re.sub(r"typing\.", "", wrong[2]):  # the message about a class is more precise as it is
        allowed = re.sub(r"<class '(\w+)'>", r"\1", wrong[2]).replace("NoneType", "null")
        allowed = re.sub(r"list\[(\w+)\]", r"a list such as '[a, b]' (of \1)", allowed).replace("typing.Literal", "")
        text = f"{wrong[1]} is {wrong[3]!r}, but must be one of: {allowed}"
    return re.sub(r"(required: |Key \")(predict|validate)\.", r"\1--", text)
