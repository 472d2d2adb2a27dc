"""`detr-lightning verify`: check every file of a folder and list the problems."""

from __future__ import annotations

import argparse

from rich.console import Console

from detr_lightning.errors import count
from detr_lightning.store.store import EmbeddingStore
from detr_lightning.store.verify import verify

SHOWN = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the folder and the number of workers."""
    parser.add_argument("folder", help="the output folder of an extraction")
    parser.add_argument("--workers", type=_at_least_one, help="files checked at the same time; default: one per core")


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def run(options: argparse.Namespace) -> int:
    """Print the problems to stderr; return 1 if there are any."""
    problems = verify(options.folder, options.workers)
    if not problems:
        store = EmbeddingStore(options.folder)
        what = "row" if store.is_table else "file"
        print(f"{count(len(store), 'image')}; every {what} is complete and correct.")
        return 0
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    for problem in problems[:SHOWN]:
        console.print(problem)
    more = f", of which the first {SHOWN} are listed" if len(problems) > SHOWN else ""
    console.print(f"{count(len(problems), 'problem')}{more}.", style="bold red")
    return 1
