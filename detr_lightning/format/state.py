"""Reads the state of an unfinished run: `run.json` and the journals. It takes no locks, so it works without fcntl."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detr_lightning.errors import InputError
from detr_lightning.format.entries import ImageEntry, SkippedImage
from detr_lightning.format.identity import RunSettings
from detr_lightning.format.names import RUN, STATE, is_image_id
from detr_lightning.format.schema import RunRecord

DONE = {"done": True}
"""The last line of a rank's journal, written once the rank has gone through all its images."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The content of `run.json`.

    Attributes:
        token: Identifies the run.
        planned: The ids of all files that this run and earlier ones wrote or plan to write.
        content: The whole JSON object, which `settings` reads on demand.
        void: Whether the run has begun to remove these files.
    """

    token: str
    planned: frozenset[int]
    content: Mapping[str, Any]
    void: bool = False

    @property
    def num_planned(self) -> int:
        """The number of images in the folder once the run has finished; an upper bound in states of older versions."""
        number = self.content.get("num_planned")
        return number if type(number) is int else len(self.planned)

    @property
    def settings(self) -> RunSettings:
        """The run's settings.

        Raises:
            InputError: They are incomplete.
        """
        return RunSettings.from_json(self.content)


def run_to_json(token: str, planned: set[int], record: RunRecord | None, num_planned: int = 0) -> dict[str, Any]:
    """Return the content of `run.json`. A run without a record removes the files of the planned ids."""
    header = {"void": True} if record is None else {**record.to_json(), "num_planned": num_planned}
    return {"token": token, **header, "planned": sorted(planned)}  # The token first: see `token_of`.


def read_run(folder: Path) -> RunState | None:
    """Return the state of a folder's unfinished run, or None if there is no such run.

    Raises:
        InputError: Its `run.json` is damaged, or reached through a link.
    """
    path = folder / STATE / RUN
    try:
        with open(path, "rb", opener=no_link) as file:
            data = file.read()
    except FileNotFoundError:
        return None
    try:
        content = json.loads(data)
        planned = frozenset(content["planned"])
        if not all(map(is_image_id, planned)):
            raise ValueError("planned lists values that are not image ids")
        return RunState(token=str(content["token"]), planned=planned, content=content, void="void" in content)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(
            f"{path} is damaged ({type(error).__name__}: {error}). "
            f"Remove {path.parent} and run the same command again: images that it cannot verify are extracted again."
        ) from error


def no_link(path: str, flags: int) -> int:
    """Open a file of a run's state, and follow no link: an `opener` for `open`.

    Raises:
        InputError: The file is a link, or lies in a linked folder.
        OSError: The file cannot be opened.
    """
    if not os.path.islink(os.path.dirname(path)):
        try:
            return os.open(path, flags | os.O_NOFOLLOW, 0o666)
        except OSError:
            if not os.path.islink(path):
                raise
    raise InputError(f"{path} is a link or in a linked folder, which a run's state must not be. Remove the link.")


def token_of(folder: Path) -> str | None:
    """Return the token of a folder's unfinished run, or None if there is no such run.

    If `run.json` begins with the token, only its beginning is read: the planned ids can fill megabytes.

    Raises:
        InputError: Its `run.json` is damaged, or reached through a link.
    """
    try:
        with open(folder / STATE / RUN, "rb", opener=no_link) as file:
            begin = file.read(200)
    except FileNotFoundError:
        return None
    if match := re.match(rb'\{\s*"token": "(\w+)"', begin):
        return match[1].decode()
    run = read_run(folder)
    return None if run is None else run.token


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """Yield a journal's entries, without damaged lines: the last line of a killed process may be incomplete."""
    with open(path, encoding="utf-8", errors="replace", opener=no_link) as file:
        for line in file:
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(entry, dict):
                yield entry


def read_entries(folder: Path, recorded: Iterable[Any] = ()) -> tuple[dict[int, ImageEntry], dict[int, SkippedImage]]:
    """Return, by id, the finished and the skipped images of the journals and of `recorded`.

    Entries that are incomplete or damaged are left out, and so are skipped images that were finished later.
    """
    journals = sorted((folder / STATE).glob("*.jsonl"))  # done.jsonl first
    finished: dict[int, ImageEntry] = {}
    failed: dict[int, SkippedImage] = {}
    for content in itertools.chain(recorded, *map(read_journal, journals)):
        entry = _parse(content)
        if isinstance(entry, SkippedImage):
            failed[entry.image_id] = entry
        elif entry is not None and entry.finished:
            finished[entry.image_id] = entry
    return finished, {image_id: skipped for image_id, skipped in failed.items() if image_id not in finished}


def _parse(content: Any) -> ImageEntry | SkippedImage | None:
    try:
        is_skipped = isinstance(content, dict) and "reason" in content
        return SkippedImage.from_json(content) if is_skipped else ImageEntry.from_json(content)
    except InputError:
        return None
