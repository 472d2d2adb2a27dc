"""`detr-lightning convert`: turn a folder of files into one Lance table, or a table into files."""

from __future__ import annotations

import argparse

from detr_lightning.errors import count
from detr_lightning.store.convert import convert


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the source and the target."""
    parser.add_argument("source", help="a finished extraction: a folder of files, or the folder or URL of a table")
    parser.add_argument("target", help="a new or empty folder, or, for a table, a URL such as s3://bucket/embeddings")


def run(options: argparse.Namespace) -> int:
    """Convert, and print a summary of the result."""
    store = convert(options.source, options.target)
    print(f"{store.name}: {count(len(store), 'image')} in {'one table' if store.is_table else 'files'}")
    return 0
