"""Reading the state of an unfinished run: `run.json` and the journals. No locks, so it works without fcntl."""

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
"""The last line of a rank's journal, once the rank went through all its images."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The content of `run.json`.

    Attributes:
        token: Which run it is.
        planned: Ids of all files that this run and earlier ones wrote or plan to write.
        content: The whole JSON object, in which `settings` are read where they are needed.
        void: Whether the run began to remove all this.
    """

    token: str
    planned: frozenset[int]
    content: Mapping[str, Any]
    void: bool = False

    @property
    def num_planned(self) -> int:
        """How many images the folder will have when the run has finished; at most, in states of older versions."""
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
    """Return the content of `run.json`; without a record the run removes the files of the planned ids."""
    header = {"void": True} if record is None else {**record.to_json(), "num_planned": num_planned}
    return {"token": token, **header, "planned": sorted(planned)}  # The token first: see `token_of`.


def read_run(folder: Path) -> RunState | None:
    """Return the state of the run that last began in a folder and has not finished; None without such a run.

    Raises:
        InputError: Its `run.json` is damaged.
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
            raise ValueError("planned lists what are no image ids")
        return RunState(token=str(content["token"]), planned=planned, content=content, void="void" in content)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(
            f"{path} is damaged ({type(error).__name__}: {error}). "
            f"Remove {path.parent} and run the same command again: what it cannot vouch for is extracted anew."
        ) from error


def no_link(path: str, flags: int) -> int:
    """Open a file of a run's state, as an `opener` of `open`.

    Raises:
        InputError: It is a link, or lies in a linked folder.
        OSError: It cannot be opened.
    """
    if not os.path.islink(os.path.dirname(path)):
        try:
            return os.open(path, flags | os.O_NOFOLLOW, 0o666)
        except OSError:
            if not os.path.islink(path):
                raise
    raise InputError(f"{path} is or lies in a link, where the state of a run belongs. Remove the link.")


def token_of(folder: Path) -> str | None:
    """Return the token of the run that last began in a folder and has not finished; None without such a run.

    Only the first line of its `run.json` is read, where it begins with the token: the planned ids fill megabytes.

    Raises:
        InputError: The `run.json` is damaged.
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
    """Yield a journal's entries; the last line of a killed process may be torn, and is left out."""
    with open(path, encoding="utf-8", errors="replace", opener=no_link) as file:
        for line in file:
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(entry, dict):
                yield entry


def read_entries(folder: Path, recorded: Iterable[Any] = ()) -> tuple[dict[int, ImageEntry], dict[int, SkippedImage]]:
    """Return, by id, the finished images and the skipped ones: the recorded ones, and those of the journals.

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
