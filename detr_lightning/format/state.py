"""Reading the state of an unfinished run: its settings and its journals. No locks, so it works without fcntl."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from detr_lightning.errors import InputError
from detr_lightning.format.schema import STATE

Entry = dict[str, Any]
"""What the metadata says about one image."""

FINISHED = {"id", "file_name", "width", "height", "input_size", "feature_size", "bytes"}
SKIPPED = {"id", "file_name", "reason"}
"""What an entry tells of a finished and of a skipped image; one that lacks any is as good as none."""


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """Yield a journal's entries; the last line of a killed process may be torn, and is left out."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(entry, dict):
                yield entry


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
        token: str = read_state(folder / STATE / "run.json")["token"]
    except FileNotFoundError:
        return None
    return token


def read_state(path: Path) -> dict[str, Any]:
    """Return what a run wrote down when it began."""
    try:
        state: dict[str, Any] = json.loads(path.read_bytes())
        return state | {"token": str(state["token"])}
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{path} is damaged ({type(error).__name__}: {error}). "
            f"Remove {path.parent} and run the same command again: what it cannot vouch for is extracted anew."
        ) from error
