"""The location of a table, and how the processes of its runs detect each other there.

On a disk, the table's folder is locked like a folder of files. An object store has no locks: there, two runs may work
on one table at once, and the versions that a process commits show that it is alive.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Collection
from pathlib import Path

from detr_lightning.errors import InputError
from detr_lightning.extraction.journal import Journal, await_done, why_unseen
from detr_lightning.extraction.locks import LockedFile, lock_folder, remove_state, sweep
from detr_lightning.extraction.previous import check_folder
from detr_lightning.format import object_store
from detr_lightning.format.files import fsync_folder, to_json_bytes, write_json
from detr_lightning.format.names import METADATA, STATE, is_url
from detr_lightning.format.schema import Metadata
from detr_lightning.format.table import Table

SILENCE = 600.0
"""Seconds without a new version after which a run on an object store gives up on its other ranks."""

POLL = 2.0
"""Seconds between checks of a table on an object store."""


class TableLocation(ABC):
    """The output folder of a run into a table, or its URL.

    Attributes:
        output_dir: The folder or URL.
        exclusive: Whether a run here locks out all others.
    """

    exclusive: bool

    def __init__(self, output_dir: str) -> None:
        self.output_dir = output_dir

    def refuse_files(self) -> None:
        """Refuse a location where no table can be created.

        Raises:
            InputError: It contains an extraction with one file per image.
            OSError: It is a file, or the object store does not answer.
        """
        if self.holds_files():
            raise InputError(
                f"output_dir {self.output_dir} contains an extraction with one file per image, not a table. "
                "Choose another output_dir for writer.layout=lance, or turn it into a table: detr-lightning convert."
            )

    @abstractmethod
    def is_used(self) -> bool:
        """Return whether the location is not empty."""

    @abstractmethod
    def holds_files(self) -> bool:
        """Return whether a location without a table has an extraction with one file per image."""

    @abstractmethod
    def has_metadata(self) -> bool:
        """Return whether `metadata.json` exists."""

    @abstractmethod
    def remove_metadata(self) -> None:
        """Remove `metadata.json`: from now on the table counts as unfinished."""

    @abstractmethod
    def take(self) -> None:
        """Lock out other runs, where that is possible, and clean up after a dead one.

        Raises:
            BusyError: Another run is at work here.
            OSError: The folder cannot be written.
        """

    @abstractmethod
    def join(self, rank: int) -> None:
        """Show the other processes that a rank is alive."""

    @abstractmethod
    def unseen(self, world_size: int) -> list[str | None]:
        """Return, for each rank, why this process cannot see that it is alive, or None. All ranks must have joined."""

    @abstractmethod
    def leave(self, done: bool) -> None:
        """Show the other processes that this rank has ended; `done` records that it has processed all its images."""

    @abstractmethod
    def await_ranks(self, world_size: int, image_ids: Collection[int]) -> None:
        """Wait until every rank has processed its images, or shows no more signs of life.

        Raises:
            RuntimeError: A rank ended early.
        """

    @abstractmethod
    def finish(self, metadata: Metadata) -> None:
        """Write the metadata and release the location."""

    @abstractmethod
    def release(self) -> None:
        """Release the location without finishing."""


class FolderLocation(TableLocation):
    """A folder on a disk."""

    exclusive = True

    def __init__(self, output_dir: str) -> None:
        super().__init__(output_dir)
        self._folder = Path(output_dir)
        self._lock: LockedFile | None = None
        self._journal: Journal | None = None

    def refuse_files(self) -> None:
        """Refuse a file, or a folder that contains an extraction with one file per image."""
        check_folder(self._folder)
        super().refuse_files()

    def is_used(self) -> bool:
        """Return whether the folder is not empty."""
        return self._folder.is_dir() and any(self._folder.iterdir())

    def holds_files(self) -> bool:
        """Return whether the folder has a `metadata.json` or a file of embeddings."""
        return self.has_metadata() or any(self._folder.glob("embedding_*.pt"))

    def has_metadata(self) -> bool:
        """Return whether `metadata.json` exists."""
        return (self._folder / METADATA).exists()

    def remove_metadata(self) -> None:
        """Remove `metadata.json`."""
        (self._folder / METADATA).unlink(missing_ok=True)

    def take(self) -> None:
        """Lock the folder, and remove the journals of a dead run."""
        self._lock = lock_folder(self._folder)
        sweep(self._folder)
        for journal in (self._folder / STATE).glob("rank-*.jsonl"):
            journal.unlink()

    def join(self, rank: int) -> None:
        """Open and lock the rank's journal."""
        self._journal = Journal(self._path(rank))

    def unseen(self, world_size: int) -> list[str | None]:
        """Return, for each rank, why its lock is not visible, or None."""
        return [why_unseen(self._path(rank)) for rank in range(world_size)]

    def leave(self, done: bool) -> None:
        """Close the rank's journal."""
        if self._journal is not None:
            self._journal.close(done)

    def await_ranks(self, world_size: int, image_ids: Collection[int]) -> None:
        """Wait until every rank has closed its journal."""
        await_done([self._path(rank) for rank in range(world_size)])

    def finish(self, metadata: Metadata) -> None:
        """Write the metadata, then remove the state."""
        write_json(self._folder / METADATA, metadata.to_json(), checksum=True)
        assert self._lock is not None, "take comes first"
        remove_state(self._folder, self._lock)
        fsync_folder(self._folder)

    def release(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()

    def _path(self, rank: int) -> Path:
        return self._folder / STATE / f"rank-{rank}.jsonl"


class StoreLocation(TableLocation):
    """A URL on an object store, where a run cannot lock out others."""

    exclusive = False

    def is_used(self) -> bool:
        """Return False: on an object store only a table counts."""
        return False

    def holds_files(self) -> bool:
        """Return whether `metadata.json` exists."""
        return self.has_metadata()

    def has_metadata(self) -> bool:
        """Return whether `metadata.json` exists."""
        return object_store.read_file(self.output_dir, METADATA) is not None

    def remove_metadata(self) -> None:
        """Remove `metadata.json`."""
        if self.has_metadata():
            object_store.remove_file(self.output_dir, METADATA)

    def take(self) -> None:
        """Do nothing."""

    def join(self, rank: int) -> None:
        """Do nothing."""

    def unseen(self, world_size: int) -> list[str | None]:
        """Return None for each rank: the versions it commits will be visible."""
        return [None] * world_size

    def leave(self, done: bool) -> None:
        """Do nothing."""

    def await_ranks(self, world_size: int, image_ids: Collection[int]) -> None:
        """Wait for the rows of all images, as long as new versions appear."""
        if world_size == 1:
            return
        version, seen_at = None, time.monotonic()
        while time.monotonic() - seen_at < SILENCE:
            found = Table(self.output_dir)
            if found.version != version:
                version, seen_at = found.version, time.monotonic()
                if found.has_all(image_ids):
                    return
            time.sleep(POLL)

    def finish(self, metadata: Metadata) -> None:
        """Write the metadata."""
        object_store.write_file(self.output_dir, METADATA, to_json_bytes(metadata.to_json(), checksum=True))

    def release(self) -> None:
        """Do nothing."""


def location_of(output_dir: str) -> TableLocation:
    """Return the location of a table."""
    return StoreLocation(output_dir) if is_url(output_dir) else FolderLocation(output_dir)
