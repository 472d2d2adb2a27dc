"""What earlier runs left in a folder: with which settings, which images, and what they still meant to do."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detr_lightning.format.files import read_metadata
from detr_lightning.format.schema import METADATA, STATE
from detr_lightning.format.state import Entry, read_entries, read_state, token_of


@dataclass
class Remains:
    """What earlier runs left.

    Attributes:
        header: Their settings: metadata without what belongs to single images. Empty where nothing was left.
        finished: Their entries of finished images, by id. Whether the files are whole is not looked at.
        failed: Their entries of skipped images, by id.
        recorded: Ids of all files that they wrote or meant to write.
        void: Whether the last run had begun to remove all this.
        stamp: What changes when another run changes the folder.
    """

    header: dict[str, Any] = field(default_factory=dict)
    finished: dict[int, Entry] = field(default_factory=dict)
    failed: dict[int, Entry] = field(default_factory=dict)
    recorded: set[int] = field(default_factory=set)
    void: bool = False
    stamp: tuple[Any, ...] = ()

    @property
    def file_ids(self) -> dict[str, int]:
        """The ids that files were given, by file name."""
        return {entry["file_name"]: image_id for image_id, entry in (self.finished | self.failed).items()}


def look(folder: Path) -> Remains:
    """Return what is left in a folder.

    Raises:
        ValueError: The metadata is another program's, or the state of an unfinished run is damaged.
    """
    remains = Remains(stamp=stamp(folder))
    path = folder / STATE / "run.json"
    run = read_state(path) if path.exists() else {}
    remains.void = "void" in run
    if (folder / METADATA).exists() and not remains.void:
        remains.header = read_metadata(folder, unfinished=True)
    remains.header |= run
    if remains.header:
        remains.finished, remains.failed = read_entries(folder, remains.header)
        remains.recorded = remains.finished.keys() | set(remains.header.get("planned", ()))
    return remains


def stamp(folder: Path) -> tuple[Any, ...]:
    """Return what tells whether another run has changed the folder."""
    try:
        metadata = os.stat(folder / METADATA)
    except FileNotFoundError:
        return token_of(folder), None
    return token_of(folder), metadata.st_ino, metadata.st_mtime_ns


def identity(header: Mapping[str, Any]) -> dict[str, Any]:
    """Return what two runs must share for their files to belong in one folder, under the names users know."""
    model = header["model"]
    settings = {
        "weights (sha256)": model["sha256"],
        "architecture": model["architecture"],
        "keys": header["embedding_keys"],
        "writer.dtype": header["dtype"],
        **{f"data.{name}": value for name, value in header["preprocessing"].items()},
        "data.batching": header["batching"],
        "trainer.precision": header["precision"],
    }
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain
