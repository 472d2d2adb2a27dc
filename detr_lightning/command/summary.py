"""`detr-lightning summary`: show the contents of a folder of embeddings."""

from __future__ import annotations

import argparse

from rich.console import Console

from detr_lightning.store.summary import summary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the folder."""
    parser.add_argument("folder", help="the output folder of an extraction")


def run(options: argparse.Namespace) -> int:
    """Print a table."""
    Console().print(summary(options.folder))
    return 0
