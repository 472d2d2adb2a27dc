"""A description of an extraction, finished or not, to be printed."""

from __future__ import annotations

import os

from rich.console import Group
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from detr_lightning.errors import InputError
from detr_lightning.format.keys import SPATIAL
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
        places = [entry.features.places if entry.features else 1 for entry in entries]
        for key, tensor in store[entries[0].image_id].items():
            spatial = key in SPATIAL
            varies = spatial and len({entry.features for entry in entries}) > 1
            share = sum(places) / places[0] if spatial else len(entries)
            shape = f"{list(tensor.shape)}{', varies' if varies else ''}"
            dtype = str(tensor.dtype).removeprefix("torch.")
            keys.add_row(key, escape(shape), dtype, decimal(int(tensor.nbytes * share)))
    return Group(facts, keys)
