"""What earlier runs left in a folder: with which settings, which images, and what they still meant to do."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detr_lightning.store.layout import METADATA, STATE, read_metadata
from detr_lightning.store.state import read_journal

Entry = dict[str, Any]
"""What the metadata says about one image."""

FINISHED = {"id", "file_name", "width", "height", "input_size", "feature_size", "bytes"}
SKIPPED = {"id", "file_name", "reason"}
"""What an entry tells of a finished and of a skipped image; one that lacks any is as good as none."""


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
    run = _read_state(path) if path.exists() else {}
    remains.void = "void" in run
    if (folder / METADATA).exists() and not remains.void:
        remains.header = read_metadata(folder, unfinished=True)
    remains.header |= run
    if remains.header:
        remains.finished, remains.failed = read_entries(folder, remains.header)
        remains.recorded = remains.finished.keys() | set(remains.header.get("planned", ()))
    return remains


def read_entries(folder: Path, metadata: Mapping[str, Any] | None = None) -> tuple[dict[int, Entry], dict[int, Entry]]:
    """Return, by id, the finished images and the skipped ones: of metadata where given, and of the journals."""
    metadata = metadata or {}
    journals = sorted((folder / STATE).glob("*.jsonl"))  # done.jsonl first
    listed = (*metadata.get("images", ()), *metadata.get("failed", ()))
    finished, failed = {}, {}
    for entry in itertools.chain(listed, *map(read_journal, journals)):
        if not isinstance(entry, dict):
            continue
        if entry.keys() >= FINISHED:
            finished[entry["id"]] = entry
        elif entry.keys() >= SKIPPED:
            failed[entry["id"]] = entry
    return finished, {image_id: entry for image_id, entry in failed.items() if image_id not in finished}


def token_of(folder: Path) -> str | None:
    """Return the token of the run that last began in a folder and has not finished."""
    try:
        token: str = _read_state(folder / STATE / "run.json")["token"]
    except FileNotFoundError:
        return None
    return token


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


def _read_state(path: Path) -> dict[str, Any]:
    """Return what a run wrote down when it began."""
    try:
        state: dict[str, Any] = json.loads(path.read_bytes())
        return state | {"token": str(state["token"])}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}). "
            f"Remove {path.parent} and run the same command again: what it cannot vouch for is extracted anew."
        ) from error
