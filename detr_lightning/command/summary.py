"""`detr-lightning summary`: show the contents of a folder of embeddings."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from detr_lightning.errors import count
from detr_lightning.format.keys import PREDICTIONS
from detr_lightning.store.predictions import CategoryCount, count_categories
from detr_lightning.store.store import EmbeddingStore
from detr_lightning.store.summary import summary

SHOWN = 12
"""The maximum number of categories listed."""

READ = 1000
"""The maximum number of images read to count the categories."""

WIDTH = 24
"""The length of the longest bar."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the folder and the score threshold."""
    parser.add_argument("folder", help="the output folder of an extraction")
    parser.add_argument("--threshold", type=float, default=0.7, help="the lowest score of an object; default: 0.7")


def run(options: argparse.Namespace) -> int:
    """Print the folder's contents, and the number of detected objects per category."""
    out = Console()
    out.print(summary(options.folder))
    store = EmbeddingStore(options.folder, partial=True)
    if len(store) and set(PREDICTIONS) <= set(store.embedding_keys):
        images = min(len(store), READ)
        part = f" of {len(store)}" if images < len(store) else ""
        threshold = max(options.threshold, store.min_score or 0)
        title = f"Objects that score {threshold} or more in {count(images, 'image')}{part}"
        out.print(_bars(title, count_categories(store, threshold, READ)))
    return 0


def _bars(title: str, counts: list[CategoryCount]) -> Table:
    table = Table("category", "objects", "", "mean score", title=title, title_justify="left")
    table.columns[1].justify = table.columns[3].justify = "right"
    for name, objects, mean in counts[:SHOWN]:
        bar = "█" * max(round(WIDTH * objects / counts[0].objects), 1)
        table.add_row(escape(name), str(objects), bar, f"{mean:.2f}")
    if others := counts[SHOWN:]:
        objects = sum(other.objects for other in others)
        mean = sum(other.objects * other.mean_score for other in others) / objects
        table.add_row(f"{len(others)} others", str(objects), "", f"{mean:.2f}")
    return table
