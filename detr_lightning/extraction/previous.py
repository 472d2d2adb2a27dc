"""The record that earlier runs left in a folder: their settings, their images, and the files they planned."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detr_lightning.errors import InputError
from detr_lightning.format.entries import ImageEntry, SkippedImage
from detr_lightning.format.identity import RunSettings
from detr_lightning.format.metadata import MetadataFile, read_metadata
from detr_lightning.format.names import METADATA, TABLE
from detr_lightning.format.state import RunState, read_entries, read_run, token_of


@dataclass
class PreviousRun:
    """The record of earlier runs in a folder.

    Attributes:
        finished: The entries of finished images, by id. Their files are not checked.
        failed: The entries of skipped images, by id.
        recorded: The ids of all images whose files they wrote or planned to write.
        void: Whether the last run had begun to remove all of this.
        stamp: A value that changes when another run changes the folder.
    """

    finished: dict[int, ImageEntry] = field(default_factory=dict)
    failed: dict[int, SkippedImage] = field(default_factory=dict)
    recorded: set[int] = field(default_factory=set)
    void: bool = False
    stamp: tuple[Any, ...] = ()
    _source: MetadataFile | RunState | None = None

    @property
    def settings(self) -> RunSettings:
        """The settings of the earlier runs.

        Raises:
            InputError: They are incomplete, or there is no earlier run.
        """
        if self._source is None:
            raise InputError("there is no earlier run")
        return self._source.settings

    @property
    def known(self) -> dict[str, ImageEntry | SkippedImage]:
        """The entries of finished and skipped images, by file name."""
        entries: list[ImageEntry | SkippedImage] = [*self.finished.values(), *self.failed.values()]
        return {entry.file_name: entry for entry in entries}


def check_folder(folder: Path) -> None:
    """Refuse an output folder that is a file, or a link to a folder that does not exist.

    Raises:
        FileNotFoundError: It is a link to a folder that does not exist.
        NotADirectoryError: It is a file.
    """
    if folder.is_symlink() and not folder.exists():
        raise FileNotFoundError(
            f"output_dir {folder} is a link to {os.readlink(folder)}, which does not exist. "
            "Create that folder, remove the link, or choose another output_dir."
        )
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"output_dir {folder} is a file. Choose a folder, or remove the file.")


def read_previous(folder: Path) -> PreviousRun:
    """Return the record of earlier runs in a folder, which need not exist.

    Raises:
        InputError: The folder contains a table, the metadata is another program's, or the state of an unfinished run is
            damaged.
        OSError: The folder is a file or a broken link, or cannot be read.
    """
    check_folder(folder)
    if (folder / TABLE).exists():
        raise InputError(
            f"output_dir {folder} contains one table, not one file per image. Choose another output_dir, or "
            "writer.layout=lance to continue with the table."
        )
    previous = PreviousRun(stamp=stamp(folder))
    run = read_run(folder)
    previous.void = run is not None and run.void
    metadata = None
    if (folder / METADATA).exists() and not previous.void:
        metadata = read_metadata(folder, unfinished=True)
    previous._source = run or metadata
    if previous._source is not None:
        previous.finished, previous.failed = read_entries(folder, metadata.entries() if metadata else ())
        previous.recorded = previous.finished.keys() | (run.planned if run else frozenset())
    return previous


def stamp(folder: Path) -> tuple[Any, ...]:
    """Return a value that changes when another run changes the folder."""
    try:
        metadata = os.stat(folder / METADATA)
    except FileNotFoundError:
        return token_of(folder), None
    return token_of(folder), metadata.st_ino, metadata.st_mtime_ns
