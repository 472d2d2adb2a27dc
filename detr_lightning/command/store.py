"""`python -m detr_lightning.store`: check, describe and convert the output folder of an extraction."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from detr_lightning.store.dataset import POOLS
from detr_lightning.store.store import EmbeddingStore
from detr_lightning.store.verify import summary, verify

SHOWN = 50
FORMATS = ("npy", "parquet", "safetensors", "coco")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 where all went well."""
    options = _parser().parse_args(argv)
    out, err = Console(), Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        if options.command == "verify":
            problems = verify(options.folder, options.workers)
            for problem in problems[:SHOWN]:
                err.print(problem, markup=False)
            if problems:
                more = f", of which the first {SHOWN} are listed" if len(problems) > SHOWN else ""
                err.print(f"{len(problems)} problem{'s' if len(problems) > 1 else ''}{more}.", style="bold red")
                return 1
            out.print(f"{len(EmbeddingStore(options.folder))} images, every file whole and right.")
        elif options.command == "summary":
            out.print(summary(options.folder))
        else:
            from detr_lightning.store.export import export  # Parquet and COCO's tools are needed here only.

            store = EmbeddingStore(options.folder)
            written = export(
                store, options.output, options.format, options.key, pool=options.pool, threshold=options.threshold
            )
            for path in written:
                out.print(f"wrote {path}", markup=False, soft_wrap=True)
    except (OSError, ValueError, ImportError) as error:
        err.print(str(error), markup=False)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m detr_lightning.store", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("verify", help="read every file again and list what is wrong", allow_abbrev=False)
    command.add_argument("folder", help="the output folder of an extraction")
    command.add_argument("--workers", type=int, help="files checked at once; by default one for each processor")
    command = commands.add_parser("summary", help="show what a folder holds", allow_abbrev=False)
    command.add_argument("folder", help="the output folder of an extraction")
    command = commands.add_parser("export", help="write the embeddings for other tools", allow_abbrev=False)
    command.add_argument("folder", help="the output folder of an extraction")
    command.add_argument("--output", required=True, metavar="FILE", help="the file to write")
    command.add_argument("--format", choices=FORMATS, default="npy", help="default: npy; coco: detection results")
    command.add_argument("--key", default="query_embeddings", help="default: query_embeddings; not used by coco")
    command.add_argument("--pool", choices=POOLS, help="over the places of the image or the object queries")
    command.add_argument("--threshold", type=float, default=0.0, help="coco: leave out lower scores; default: 0")
    return parser


if __name__ == "__main__":
    sys.exit(main())
