"""`detr-lightning search`: find the objects in a folder that are most similar to those in an image."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from detr_lightning.errors import InputError, SettingError
from detr_lightning.store.store import EmbeddingStore


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the folder, the image, the selection of its objects, and the destination of the results."""
    parser.add_argument("folder", help="the output folder of an extraction with query_embeddings")
    parser.add_argument("--image", required=True, metavar="FILE", help="the image to search with")
    parser.add_argument(
        "--box", type=_numbers, metavar="X,Y,W,H", help="search with the detection that overlaps this box most"
    )
    parser.add_argument("--crop", type=_numbers, metavar="X,Y,W,H", help="crop the image to this box first")
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.7,
        help="the lowest score of an object in the image and, without --table, of those it is compared with; "
        "default: 0.7",
    )
    parser.add_argument("-k", type=int, default=10, help="results per object; default: 10")
    parser.add_argument("--weights", metavar="FILE", help="the model's weights, if they have moved")
    parser.add_argument(
        "--table",
        metavar="FILE.parquet",
        help="the table of objects, written if it is missing; default: FOLDER.objects.parquet",
    )
    parser.add_argument("--exact", action="store_true", help="compare with every object, even of 100,000 or more")
    parser.add_argument("--sheet", metavar="FILE.png", help="draw the results as a contact sheet")
    parser.add_argument("--overwrite", action="store_true", help="with --sheet: replace an existing file")
    parser.add_argument("--image_dir", metavar="DIR", help="with --sheet: the image folder, if it has moved")


def run(options: argparse.Namespace) -> int:
    """Print the results, and draw them if `--sheet` is given."""
    import numpy as np

    from detr_lightning.analysis.cached import objects_table, source_of
    from detr_lightning.analysis.search import ObjectSearch
    from detr_lightning.query import query_objects

    store = EmbeddingStore(options.folder)
    sheet = None if options.sheet is None else _sheet(store, options.sheet, options.overwrite)
    if options.image_dir is not None and not Path(options.image_dir).expanduser().is_dir():
        raise SettingError(f"--image_dir is {options.image_dir}, which is not a folder.")
    table = objects_table(store, options.threshold, path=options.table, outcomes=False)
    search = ObjectSearch(table, exact=options.exact or None)
    if not len(search):
        raise InputError(f"{table} has no objects to compare with. Write it again with a lower threshold.")
    source = source_of(table)
    queries = query_objects(
        store,
        options.image,
        box=options.box,
        crop=options.crop,
        threshold=options.threshold,
        key=source["key"],
        layer=source["layer"],
        weights=options.weights,
    )
    found = search.search(np.stack(list(queries["embedding"])), options.k)
    out = Console(soft_wrap=True, highlight=False)
    for number, query in enumerate(queries.itertuples()):
        out.print(f"{query.category} {query.score:.2f} at {_box(query)}", markup=False)
        for row in found[found["search"] == number].itertuples():
            line = (
                f"  {row.rank:>3}  {row.similarity:.3f}  {row.file_name}  {row.category} {row.score:.2f} at {_box(row)}"
            )
            out.print(line, markup=False)
    if sheet is not None:
        _draw(store, options, queries, found, sheet)
        out.print(f"wrote {sheet}", markup=False)
    return 0


def _numbers(text: str) -> list[float]:
    try:
        x, y, width, height = map(float, text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not x,y,width,height in pixels") from error
    return [x, y, width, height]


def _box(row: object) -> str:
    return ",".join(f"{number:.0f}" for number in row.bbox)  # type: ignore[attr-defined]


def _sheet(store: EmbeddingStore, name: str, overwrite: bool) -> Path:
    from detr_lightning.store.export import output_path

    path = Path(name)
    if path.suffix not in (".png", ".jpg", ".pdf", ".svg"):
        raise SettingError(f"--sheet is {name}, but a contact sheet must end in .png, .jpg, .pdf or .svg.")
    return output_path(store, path, path.suffix, overwrite)


def _draw(store: EmbeddingStore, options: argparse.Namespace, queries: object, found: object, path: Path) -> None:
    import numpy as np

    from detr_lightning.analysis.pictures import read_picture
    from detr_lightning.analysis.plots import search_results

    picture = np.asarray(read_picture(store, Path(options.image).expanduser()))
    search_results(store, queries, found, picture, options.image_dir).savefig(path, dpi=150)
