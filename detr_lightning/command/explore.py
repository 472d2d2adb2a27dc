"""`detr-lightning explore`: explore the objects of a folder of embeddings in a browser."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from detr_lightning.errors import SettingError
from detr_lightning.store.store import EmbeddingStore


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the folder, the selection of objects, and the destination of the page."""
    parser.add_argument("folder", help="the output folder of an extraction with query_embeddings")
    parser.add_argument("--threshold", type=float, default=0.7, help="the lowest score of an object; default: 0.7")
    parser.add_argument("--annotations", metavar="FILE", help="COCO's instances_*.json, to compare the objects with")
    parser.add_argument("--image_dir", metavar="DIR", help="the image folder, if it has moved")
    parser.add_argument("--export", metavar="DIR", help="write a static page to this folder instead of serving one")
    parser.add_argument("--overwrite", action="store_true", help="with --export: write to a folder that is not empty")
    parser.add_argument("--port", type=int, default=5055, help="the port of the served page; default: 5055")


def run(options: argparse.Namespace) -> int:
    """Prepare the table once, then serve or write the page."""
    from detr_lightning.analysis import explore
    from detr_lightning.analysis.cached import objects_table

    explore.require_atlas()
    out = Console(soft_wrap=True, highlight=False)
    store = EmbeddingStore(options.folder)
    if store.folder is None:
        raise SettingError(f"{store.name} is not a folder; explore needs a folder of embeddings.")
    if options.image_dir is not None and not Path(options.image_dir).expanduser().is_dir():
        raise SettingError(f"--image_dir is {options.image_dir}, which is not a folder.")
    page = None if options.export is None else Path(options.export).expanduser()
    if page is None:
        explore.check_port(options.port)
    else:
        explore.check_folder(page, options.overwrite)
    table = objects_table(store, options.threshold, options.annotations)
    prepared = table.with_suffix(".explore.parquet")
    pictures = explore.prepare(store, table, prepared, options.image_dir)
    out.print(f"{prepared} is ready", markup=False)
    if not pictures:
        out.print("No thumbnails: the images have moved. Set --image_dir.")
    if page is None:
        return explore.serve(prepared, pictures, options.port)
    explore.export(prepared, pictures, page)
    out.print(f"wrote {page}: serve it, for example with `python -m http.server -d {page}`", markup=False)
    return 0
