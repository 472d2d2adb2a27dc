"""A description of an extraction, finished or not, to be printed."""

from __future__ import annotations

import math
import os

from rich.console import Group
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from detr_lightning.errors import InputError
from detr_lightning.format.entries import ImageEntry
from detr_lightning.format.keys import AXES, SPATIAL
from detr_lightning.store.store import EmbeddingStore


def summary(folder: str | os.PathLike[str]) -> Group:
    """Return a description for rich to print: the images, the keys with shapes and bytes, and how they were made.

    Raises:
        FileNotFoundError: There is no such folder, or no extraction in it.
        InputError: Its `metadata.json` is damaged or another program's.
    """
    store = EmbeddingStore(folder, partial=True)
    metadata = store.metadata_file
    entries = list(map(store.entry, store))
    failed = metadata.failed()
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    try:
        settings = metadata.settings
        model = f"{settings.model.weights}  (sha256 {settings.model.sha256[:8]})"
        stored = f"{settings.dtype}, computed in {settings.precision}"
    except InputError as error:
        model = stored = f"unknown ({error})"
    for name, value in {
        "folder": store.name,
        "images": store.progress if store.is_partial else len(store),
        "failed": len(failed),
        "extract type": metadata.extract_type,
        "model": model,
        "stored as": stored,
        "on disk": decimal(store.bytes_on_disk),
        **{f"failed {entry.image_id}": f"{entry.file_name}: {entry.reason}" for entry in failed[:5]},
    }.items():
        facts.add_row(escape(name), escape(str(value)))

    keys = Table("key", "shape", "dtype", "all images")
    keys.columns[3].justify = "right"
    if entries:
        sample = max(entries, key=lambda entry: entry.num_queries or 0)
        for key, tensor in store[sample.image_id].items():
            cells = [_cells(key, entry) for entry in entries]
            shape = f"{list(tensor.shape)}{', varies' if len(set(cells)) > 1 else ''}"
            dtype = str(tensor.dtype).removeprefix("torch.")
            share = sum(map(math.prod, cells)) / max(1, math.prod(_cells(key, sample)))
            keys.add_row(key, escape(shape), dtype, decimal(int(tensor.nbytes * share)))
    return Group(facts, keys)


def _cells(key: str, entry: ImageEntry) -> tuple[int, int]:
    """Return the sizes of a tensor that differ between images: its places and its queries, 1 where it has none."""
    places = entry.features.places if entry.features and key in SPATIAL else 1
    queries = entry.num_queries if "queries" in AXES.get(key, ()) else None
    return places, 1 if queries is None else queries
