"""`detr-lightning convert`: a folder of files as one Lance table, or a table as files."""

from __future__ import annotations

import argparse

from detr_lightning.errors import count
from detr_lightning.store.convert import convert


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the two places."""
    parser.add_argument("source", help="a finished extraction: a folder of files, or a table and its URL")
    parser.add_argument("target", help="an empty or new folder, or for a table a URL such as s3://bucket/embeddings")


def run(options: argparse.Namespace) -> int:
    """Convert, and print a summary of the result."""
    store = convert(options.source, options.target)
    print(f"{store.name}: {count(len(store), 'image')} in {'one table' if store.is_table else 'files'}")
    return 0
