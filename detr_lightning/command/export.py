"""`detr-lightning export`: write embeddings or detections for other tools."""

from __future__ import annotations

import argparse

from detr_lightning.store.stack import POOLS
from detr_lightning.store.store import EmbeddingStore

FORMATS = ("npy", "parquet", "safetensors", "coco")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the folder, the output file and its contents."""
    parser.add_argument("folder", help="the output folder of an extraction")
    parser.add_argument("--output", required=True, metavar="FILE", help="the file to write")
    parser.add_argument("--format", choices=FORMATS, default="npy", help="coco writes detection results; default: npy")
    parser.add_argument("--key", default="query_embeddings", help="default: query_embeddings; not used by coco")
    parser.add_argument("--pool", choices=POOLS, help="pool each image's positions or queries into one vector")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    parser.add_argument("--threshold", type=float, default=0.0, help="for coco: the lowest score; default: 0")


def run(options: argparse.Namespace) -> int:
    """Write the export, and print the name of each written file."""
    from detr_lightning.store.export import export

    written = export(
        EmbeddingStore(options.folder),
        options.output,
        options.format,
        options.key,
        pool=options.pool,
        threshold=options.threshold,
        overwrite=options.overwrite,
    )
    for path in written:
        print(f"wrote {path}")
    return 0
