"""The entry point of the command line: runs a verb and returns its exit code."""

from __future__ import annotations

import argparse
import re
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from detr_lightning import __version__
from detr_lightning.command.plain_warnings import plain_warnings
from detr_lightning.command.settings import help_of, help_of_trainer
from detr_lightning.command.verbs import VERBS, load_verb
from detr_lightning.command.words import checked_words
from detr_lightning.errors import DETRLightningError, SettingError, did_you_mean
from detr_lightning.launch import end_with_parent, forget_stale_launchers, launched_by_rank_0, sigterm_as_interrupt

PROGRAM = "detr-lightning"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The command-line arguments; by default, `sys.argv[1:]`.

    Returns:
        The exit code: 0 for success, 1 for an error, which is printed as one message, 130 after Ctrl-C. An unexpected
        exception is raised.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        return _run(words)
    except KeyboardInterrupt:
        return _fail("Interrupted.", 130)
    except (DETRLightningError, OSError) as error:
        return _fail(str(error), 1)


def _run(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return 0 if words else 1
    name, *rest = words
    if name == "--version":
        print(f"{PROGRAM} {__version__}")
        return 0
    if name not in VERBS:
        raise SettingError(_unknown(name, rest))
    if VERBS[name].lightning:
        return _run_lightning(name, rest)
    module = load_verb(name)
    parser = VerbParser(name)
    module.add_arguments(parser)
    with sigterm_as_interrupt(), plain_warnings():
        return module.run(parser.parse_args(rest))


def _run_lightning(verb: str, words: Sequence[str]) -> int:
    if "-h" in words or "--help" in words:
        print(help_of(verb))
        return 0
    if "--help_trainer" in words:
        print(help_of_trainer())
        return 0
    words = checked_words(verb, words)
    forget_stale_launchers()  # before Lightning reads the environment
    end_with_parent()
    if launched_by_rank_0():  # Rank 0 handles Ctrl-C, and would be killed if this rank ended first.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        from detr_lightning.command.cli import run  # Importing Lightning takes seconds.
    except KeyboardInterrupt:
        return _fail("Interrupted before anything was done.", 130)
    return run(verb, words)


def overview() -> str:
    """Return the help of the command: each verb with a one-line description and an example."""
    width = max(map(len, VERBS)) + 2
    lines = [f"usage: {PROGRAM} VERB ...", "", "Extract DETR embeddings for COCO or any folder of images.", ""]
    for name, verb in VERBS.items():
        lines += [f"  {name:{width}}{verb.help}", f"  {'':{width}}$ {PROGRAM} {name} {verb.example}"]
    return "\n".join([*lines, "", f"{PROGRAM} VERB --help lists its settings; --version prints the version."])


class VerbParser(argparse.ArgumentParser):
    """The argument parser of one verb, which raises a short error instead of exiting.

    Args:
        name: The verb.
    """

    def __init__(self, name: str) -> None:
        verb = VERBS[name]
        super().__init__(
            f"{PROGRAM} {name}",
            description=f"{verb.help[0].upper()}{verb.help[1:]}.",
            epilog=f"Example: {PROGRAM} {name} {verb.example}",
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raise the error, with a suggestion for an unknown flag.

        Raises:
            SettingError: Always.
        """
        unknown = re.search(r"unrecognized arguments: (--\w+)", message)
        if unknown:
            message += did_you_mean(unknown[1], (flag for action in self._actions for flag in action.option_strings))
        raise SettingError(f"{self.prog}: {message}. See {self.prog} --help.")


def _unknown(name: str, rest: Sequence[str]) -> str:
    if name.startswith("-"):
        verb = next((word for word in rest if word in VERBS), "VERB")
        return f"The verb comes first, then settings such as {name}: {PROGRAM} {verb} {name} ..."
    return f"There is no verb {name!r}. The verbs are {', '.join(VERBS)}.{did_you_mean(name, VERBS)}"


def _fail(message: str, code: int) -> int:
    print(f"Error: {message}", file=sys.stderr, flush=True)
    return code
