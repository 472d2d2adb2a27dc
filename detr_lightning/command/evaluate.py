"""`detr-lightning evaluate`: compute COCO's metrics from an extraction."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table

from detr_lightning.errors import count
from detr_lightning.store.store import EmbeddingStore


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the folder, the annotations and the output file."""
    parser.add_argument("folder", help="the output folder of an extraction")
    parser.add_argument("--annotations", required=True, metavar="FILE", help="COCO's instances_*.json of these images")
    parser.add_argument("--output", metavar="FILE.json", help="also write the metrics to this file")
    parser.add_argument("--overwrite", action="store_true", help="with --output: replace an existing file")


def run(options: argparse.Namespace) -> int:
    """Print the metrics as a table, and write them to the file of `--output`."""
    from detr_lightning.analysis.evaluation import evaluate_store
    from detr_lightning.format.files import write_json
    from detr_lightning.store.export import output_path

    store = EmbeddingStore(options.folder)
    path = output_path(store, options.output, ".json", options.overwrite) if options.output else None
    numbers = evaluate_store(store, options.annotations)
    table = Table("COCO metric", "value", title=f"{store.name}: {count(len(store), 'image')}", title_justify="left")
    table.columns[1].justify = "right"
    for name, value in numbers.items():
        table.add_row(name, f"{value:.3f}")
    out = Console()
    out.print(table)
    if failed := store.metadata_file.failed():
        out.print(f"Not included: {count(len(failed), 'image')} that could not be read during the extraction.")
    if path is not None:
        write_json(path, {**numbers, "images": len(store)})
        out.print(f"wrote {path}", markup=False, soft_wrap=True)
    return 0
