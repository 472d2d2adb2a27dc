"""The verbs of the command. The module of a verb is imported only when the verb is used."""

from __future__ import annotations

import argparse
import importlib
from typing import NamedTuple, Protocol, cast


class VerbModule(Protocol):
    """The functions in the module of every verb except `predict` and `validate`."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the verb's arguments to the parser."""

    def run(self, options: argparse.Namespace) -> int:
        """Run the verb with parsed arguments; return the exit code.

        Raises:
            DETRLightningError: The arguments or files cannot be used. The command prints the message and exits with 1.
            OSError: A file cannot be read or written. Handled in the same way.
        """


class Verb(NamedTuple):
    """A verb of the command."""

    help: str
    """A one-line description."""
    example: str
    """The arguments of an example that works."""
    lightning: bool = False
    """Whether `command/cli.py` runs it, through LightningCLI."""
    more: tuple[str, ...] = ()
    """The arguments of further examples, for the verb's own help."""


VERBS = {
    "predict": Verb(
        "extract embeddings: one .pt file per image, and metadata.json",
        "--data.image_dir photos --output_dir out",
        lightning=True,
        more=("--config decoder --data.download true", "--config demo --dry_run"),
    ),
    "validate": Verb("compute a model's COCO AP on annotated images", "--config demo", lightning=True),
    "summary": Verb("show the contents of a folder of embeddings", "out"),
    "verify": Verb("check every file of a folder and list the problems", "out"),
    "export": Verb(
        "write embeddings or detections as npy, parquet, safetensors, coco", "out --pool mean --output vectors.npy"
    ),
    "convert": Verb("turn a folder of files into one Lance table, or a table into files", "out out_table"),
    "objects": Verb("write a table with one row per detected object", "out --output objects.parquet"),
    "evaluate": Verb("compute the COCO AP from a folder of embeddings", "out --annotations FILE.json"),
    "search": Verb("find the objects most similar to those in an image", "out --image photo.jpg --sheet found.png"),
    "explore": Verb("explore the objects in a browser", "out --annotations FILE.json"),
}
"""All verbs, in the order of the help. The module of each is `detr_lightning.command.VERB`."""


def load_verb(name: str) -> VerbModule:
    """Import the module of a verb that does not need Lightning."""
    return cast(VerbModule, importlib.import_module(f"detr_lightning.command.{name}"))
