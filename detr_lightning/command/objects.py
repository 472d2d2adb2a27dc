"""`detr-lightning objects`: write a table with one row per detected object."""

from __future__ import annotations

import argparse

from rich.console import Console

from detr_lightning.errors import count
from detr_lightning.store.store import EmbeddingStore


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the folder, the output file and the selection of objects."""
    parser.add_argument("folder", help="the output folder of an extraction")
    parser.add_argument("--output", required=True, metavar="FILE.parquet", help="the file to write")
    parser.add_argument("--threshold", type=float, default=0.7, help="the lowest score of an object; default: 0.7")
    parser.add_argument("--annotations", metavar="FILE", help="COCO's instances_*.json, to compare the objects with")
    parser.add_argument("--iou", type=float, default=0.5, help="the lowest IoU of a match; default: 0.5")
    parser.add_argument(
        "--key",
        choices=("query_embeddings", "decoder_output", "none"),
        default="query_embeddings",
        help="the source of the embeddings; none leaves them out; default: query_embeddings",
    )
    parser.add_argument("--layer", type=int, default=-1, help="for decoder_output: the layer; default: -1, the last")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")


def run(options: argparse.Namespace) -> int:
    """Write the table, and print how many objects it has."""
    from detr_lightning.analysis.overlap import OUTCOMES
    from detr_lightning.analysis.reader import ObjectReader
    from detr_lightning.analysis.tables import stream
    from detr_lightning.store.export import output_path

    store = EmbeddingStore(options.folder)
    path = output_path(store, options.output, ".parquet", options.overwrite)
    key = None if options.key == "none" else options.key
    reader = ObjectReader(store, options.threshold, None, key, options.layer, options.annotations, options.iou)
    outcomes = stream(reader, path)
    out = Console(soft_wrap=True, highlight=False)
    if not outcomes.total():
        Console(stderr=True, soft_wrap=True, highlight=False).print(reader.nothing_found(), markup=False)
    out.print(f"wrote {path}: {count(outcomes.total(), 'object')} in {count(len(store), 'image')}", markup=False)
    for name, meaning in OUTCOMES.items():
        if name in outcomes:
            out.print(f"  {outcomes[name]:>9} {name:<14} {meaning}", markup=False)
    return 0
