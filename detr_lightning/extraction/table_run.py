"""An extraction into one Lance table, on a disk or an object store.

On a disk the table's folder is locked as a folder of files is. An object store has no locks: there, two runs may work
on one table at once. Neither loses a row of the other's, and an image that both have written is kept once.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

from torch import Tensor

from detr_lightning.errors import InputError
from detr_lightning.extraction.checks import (
    HashFiles,
    refuse_changed_files,
    refuse_missing,
    refuse_other_images,
    refuse_other_settings,
    refuse_used,
)
from detr_lightning.extraction.journal import (
    Journal,
    LockedFile,
    await_done,
    lock_folder,
    remove_state,
    sweep,
    why_unseen,
)
from detr_lightning.extraction.planned import PlannedRun
from detr_lightning.extraction.row_writer import BUFFER, RowWriter
from detr_lightning.format import columns, object_store
from detr_lightning.format.entries import ImageEntry, SkippedImage
from detr_lightning.format.files import fsync_folder, to_json_bytes, write_json
from detr_lightning.format.keys import QUERY_INDEX, FeatureSizes
from detr_lightning.format.names import METADATA, STATE, is_url
from detr_lightning.format.schema import LANCE, Metadata, RunRecord
from detr_lightning.format.table import PLANNED, Table

SILENCE = 600.0
"""Seconds without a new version after which a run on an object store gives up on its other ranks."""

POLL = 2.0
"""Seconds between two looks at a table on an object store."""

STALE = timedelta(days=1)
"""A run that registered longer ago, and did not finish, is taken for dead."""

_RUN = "detr_lightning.run."
"""Begins the keys of the dataset's config under which runs register while they live."""


@dataclass(frozen=True)
class PreviousTable:
    """The record of earlier runs in a table.

    Attributes:
        version: The version of the table that was read; None where there is none.
        entries: Of finished and skipped images.
    """

    version: int | None = None
    entries: Sequence[ImageEntry | SkippedImage] = ()

    @classmethod
    def read(cls, output_dir: str) -> PreviousTable:
        """Read an output folder or URL, which need not hold a table."""
        return cls.of(Table(output_dir)) if object_store.exists(output_dir) else cls()

    @classmethod
    def of(cls, table: Table) -> PreviousTable:
        """Read a table."""
        return cls(table.version, [entry for entry, _ in table.entries()])

    @property
    def known(self) -> dict[str, ImageEntry | SkippedImage]:
        """The entries by file name."""
        return {entry.file_name: entry for entry in self.entries}


class TableRun(PlannedRun):
    """One run of an extraction into a table.

    Args:
        output_dir: The folder, or its URL on an object store.
        record: The metadata without the images.
        images: The planned images.
        failures: Planned images that cannot be read.
        if_exists: `resume`, `overwrite` or `error`.
        hash_files: Given, the files of finished images are compared with those that were extracted.
        previous: What the table held, if it was read; it is read again if it has changed.
        features: The feature maps of one image.
        commit_seconds: A rank commits its rows when its last commit is this long ago: a kill loses no older work.
    """

    def __init__(
        self,
        output_dir: str,
        record: RunRecord,
        images: Iterable[ImageEntry],
        failures: Iterable[SkippedImage] = (),
        if_exists: str = "resume",
        hash_files: HashFiles | None = None,
        previous: PreviousTable | None = None,
        *,
        features: FeatureSizes,
        commit_seconds: float = 30.0,
    ) -> None:
        super().__init__(record, images, failures, if_exists, hash_files)
        self.output_dir = output_dir
        self._folder = None if is_url(output_dir) else Path(output_dir)
        self._schema = columns.table_schema(record, features)
        self._commit_seconds = commit_seconds
        self._hashed: dict[int, ImageEntry] = {}
        self._previous = previous or PreviousTable()
        self._lock: LockedFile | None = None
        self._journal: Journal | None = None
        self._rows: RowWriter | None = None

    def inspect(self) -> None:
        """Find out what is finished, and change nothing.

        Raises:
            OSError: The folder is a file, or the object store does not answer.
            FileExistsError: It is not empty, and `if_exists` is `error`.
            InputError: It holds files, another program's table, or a table of other settings or images.
        """
        self.finished, self.complete, self._hashed = {}, False, {}
        there = object_store.exists(self.output_dir)
        if self.if_exists == "error" and (there or self._is_used()):
            refuse_used(self.output_dir)
        if not there:
            self._previous = PreviousTable()
            self._refuse_files()
            return
        if self.if_exists == "overwrite":
            return
        found = Table(self.output_dir)
        if found.version != self._previous.version:
            self._previous = PreviousTable.of(found)
        failed = set()
        for entry in self._previous.entries:
            if isinstance(entry, ImageEntry):
                self.finished[entry.image_id] = entry
            else:
                failed.add(entry.image_id)
        if self.finished:
            refuse_other_settings(self.output_dir, self.finished, lambda: found.record.settings, self.record.settings)
            refuse_other_images(self.output_dir, self.finished, self.images)
            if self.hash_files is not None:
                self._hashed = refuse_changed_files(self.output_dir, self.finished, self.images, self.hash_files)
                self.finished |= self._hashed
        self.complete = (
            self._has_metadata() and not self.pending and not self._hashed and self.failures.keys() <= failed
        )

    def begin(self) -> None:
        """Take the table: make it, or clear up after a dead run, and register this one.

        Raises:
            BusyError: Another run is at work in the folder.
            OSError: The table cannot be written.
        """
        if self._folder is not None:
            self._lock = lock_folder(self._folder)
            sweep(self._folder)
            for journal in (self._folder / STATE).glob("rank-*.jsonl"):
                journal.unlink()
        found = None if object_store.exists(self.output_dir) else self._create()
        if found is None:
            found = Table(self.output_dir)
            if self.if_exists == "overwrite":
                found.empty(self._schema)
            elif found.version != self._previous.version:
                self.inspect()  # Another run has begun since.
        self._remove_metadata()
        tried_again = self.images.keys() | self.failures.keys()
        found.delete([place for entry, place in found.entries(skipped=True) if entry.image_id in tried_again])
        found.record_hashes({image_id: str(entry.image_sha256) for image_id, entry in self._hashed.items()})
        self.token = uuid.uuid4().hex
        num_planned = len(self.finished.keys() | self.images.keys())
        begun = datetime.now(timezone.utc).isoformat()
        found.configure({_RUN + self.token: begun, PLANNED: str(num_planned)})

    def _create(self) -> Table | None:
        """Return a new table, or None where another run has made it meanwhile."""
        try:
            return Table.create(self.output_dir, self._schema)
        except OSError:
            if object_store.exists(self.output_dir):
                return None
            raise

    def join(self, rank: int) -> None:
        """Start this rank."""
        if self._folder is not None:
            self._journal = Journal(self._folder / STATE / f"rank-{rank}.jsonl")
        self._rows = RowWriter(self.output_dir, Table(self.output_dir).schema, self._commit_seconds)
        if rank == 0:
            for failure in self.failures.values():
                self._rows.add((failure, {}))

    def shares_folder(self, token: str) -> bool:
        """Return whether this rank sees the run that rank 0 began: whether both write to one table."""
        return object_store.exists(self.output_dir) and _RUN + token in Table(self.output_dir).config

    def unseen(self, world_size: int) -> list[str | None]:
        """Return for each rank, all having joined, None or why this process would not see that it is alive."""
        if self._folder is None:
            return [None] * world_size
        return [why_unseen(self._folder / STATE / f"rank-{rank}.jsonl") for rank in range(world_size)]

    def save(self, image_id: int, tensors: Mapping[str, Tensor], features: FeatureSizes) -> int:
        """Add an image's row, to be committed soon; return its tensors' bytes. Any thread may call it."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        index = tensors.get(QUERY_INDEX)
        num_queries = None if index is None else len(index)
        self._add(replace(self.images[image_id], features=features, num_queries=num_queries), tensors)
        return size

    def fail(self, image_id: int, reason: str) -> None:
        """Add a row for an image that was skipped."""
        self._add(SkippedImage(image_id, self.images[image_id].file_name, reason), {})

    def leave(self, done: bool) -> None:
        """Close this rank's journal; where the rank went through all its images, commit what is waiting first."""
        if done:
            assert self._rows is not None, "join comes first"
            self._rows.flush(commit=True)
        if self._journal is not None:
            self._journal.close(done)

    def release(self) -> None:
        """Let go of the folder without finishing."""
        if self._lock is not None:
            self._lock.close()

    def finish(self, world_size: int) -> Metadata:
        """Wait for all ranks, count the rows, tidy the table, and write the metadata.

        Returns:
            The metadata.

        Raises:
            IncompleteError: A planned image has no row.
            RuntimeError: A rank ended early.
        """
        if self._folder is not None:
            await_done([self._folder / STATE / f"rank-{rank}.jsonl" for rank in range(world_size)])
        elif world_size > 1:
            self._await_rows()
        entries = self._count()
        refuse_missing(self.output_dir, sorted(self.images.keys() - entries.keys()), len(self.images), "row")
        self._tidy()
        metadata = Metadata(
            run=self.record,
            images=[entry for entry in entries.values() if isinstance(entry, ImageEntry)],
            failed=[entry for entry in entries.values() if isinstance(entry, SkippedImage)],
            layout=LANCE,
        )
        self._write_metadata(metadata)
        return metadata

    def _add(self, entry: ImageEntry | SkippedImage, tensors: Mapping[str, Tensor]) -> None:
        assert self._rows is not None, "join comes first"
        self._rows.add((entry, tensors))

    def _await_rows(self) -> None:
        """Wait for the rows of all planned images, as long as new versions appear."""
        version, seen_at = None, time.monotonic()
        while time.monotonic() - seen_at < SILENCE:
            found = Table(self.output_dir)
            if found.version != version:
                version, seen_at = found.version, time.monotonic()
                if found.has_all(self.images.keys()):
                    return
            time.sleep(POLL)

    def _count(self) -> dict[int, ImageEntry | SkippedImage]:
        """Return the entry of each row, ascending by id, after removing rows that an image has too many."""
        found = Table(self.output_dir)
        kept: dict[int, tuple[ImageEntry | SkippedImage, int]] = {}
        surplus = []
        for entry, place in found.entries():
            first, first_place = kept.setdefault(entry.image_id, (entry, place))
            if first is not entry:
                better = isinstance(first, SkippedImage) and isinstance(entry, ImageEntry)
                surplus.append(first_place if better else place)
                if better:
                    kept[entry.image_id] = entry, place
        found.delete(surplus)
        return {image_id: kept[image_id][0] for image_id in sorted(kept)}

    def _tidy(self) -> None:
        """Join small fragments, index the ids, and remove old versions where no other run may need them."""
        found = Table(self.output_dir)
        found.optimise(BUFFER)
        runs = {name: begun for name, begun in found.config.items() if name.startswith(_RUN)}
        own = _RUN + str(self.token)
        alone = self._folder is not None or not any(_is_recent(runs[name]) for name in runs if name != own)
        found.configure(dict.fromkeys([*runs, PLANNED] if alone else [own]))
        if alone:
            found.remove_old_versions()

    def _is_used(self) -> bool:
        return self._folder is not None and self._folder.is_dir() and any(self._folder.iterdir())

    def _refuse_files(self) -> None:
        if self._folder is not None and self._folder.exists() and not self._folder.is_dir():
            raise NotADirectoryError(f"output_dir {self._folder} is a file. Choose a folder, or remove the file.")
        if self._has_metadata() or (self._folder is not None and any(self._folder.glob("embedding_*.pt"))):
            raise InputError(
                f"output_dir {self.output_dir} holds an extraction with one file per image, not a table. Choose "
                "another output_dir for writer.layout lance, or make a table of it: detr-lightning convert."
            )

    def _has_metadata(self) -> bool:
        if self._folder is not None:
            return (self._folder / METADATA).exists()
        return object_store.read_file(self.output_dir, METADATA) is not None

    def _remove_metadata(self) -> None:
        if self._folder is not None:
            (self._folder / METADATA).unlink(missing_ok=True)
        elif self._has_metadata():
            object_store.remove_file(self.output_dir, METADATA)

    def _write_metadata(self, metadata: Metadata) -> None:
        content = metadata.to_json()
        if self._folder is None:
            object_store.write_file(self.output_dir, METADATA, to_json_bytes(content, checksum=True))
            return
        write_json(self._folder / METADATA, content, checksum=True)
        assert self._lock is not None, "begin comes first"
        remove_state(self._folder, self._lock)
        fsync_folder(self._folder)


def _is_recent(begun: str) -> bool:
    with contextlib.suppress(ValueError):
        return datetime.now(timezone.utc) - datetime.fromisoformat(begun) < STALE
    return False
