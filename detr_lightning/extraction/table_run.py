"""The run of an extraction into one Lance table, on a disk or an object store.

On an object store two runs may work on one table at once. Neither loses the other's rows, and an image that both
have written is kept once.
"""

from __future__ import annotations

import contextlib
import re
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import datetime, timedelta, timezone

from torch import Tensor

from detr_lightning.errors import BusyError, InputError
from detr_lightning.extraction.checks import HashFiles, refuse_missing, refuse_used
from detr_lightning.extraction.planned import PlannedRun
from detr_lightning.extraction.previous_table import PreviousTable
from detr_lightning.extraction.row_writer import BUFFER, RowWriter
from detr_lightning.extraction.table_locations import location_of
from detr_lightning.format import columns, object_store
from detr_lightning.format.entries import ImageEntry, SkippedImage
from detr_lightning.format.keys import QUERY_INDEX, FeatureSizes
from detr_lightning.format.schema import LANCE, Metadata, RunRecord
from detr_lightning.format.table import PLANNED, Table

STALE = timedelta(days=1)
"""An unfinished run that registered longer ago than this is considered dead."""

_RUN = "detr_lightning.run."
"""The prefix of the keys in the dataset's config under which runs register while they are alive."""

_SURROGATE = re.compile("[\ud800-\udfff]")
"""What Python puts in place of bytes that are not UTF-8."""


class TableRun(PlannedRun):
    """One run of an extraction into a table.

    Args:
        output_dir: The folder, or its URL on an object store.
        record: The metadata without the images.
        images: The planned images.
        failures: Planned images that cannot be read.
        if_exists: `resume`, `overwrite` or `error`.
        hash_files: If given, checks that the files of finished images have not changed since they were extracted.
        previous: The record of earlier runs, if it was read; it is read again if the table has changed.
        features: The sizes of one image's feature maps.
        commit_seconds: A rank commits its rows once its last commit is this long ago, so a kill loses no older work.
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
        self._location = location_of(output_dir)
        self._schema = columns.table_schema(record, features)
        self._commit_seconds = commit_seconds
        self._hashed: dict[int, ImageEntry] = {}
        self._previous = previous or PreviousTable()
        self._rows: RowWriter | None = None

    def inspect(self) -> None:
        """Find the finished images, and change nothing.

        Raises:
            OSError: The folder is a file, or the object store does not answer.
            FileExistsError: It is not empty, and `if_exists` is `error`.
            InputError: It contains files, another program's table, or a table with other settings or images.
        """
        self.finished, self.complete, self._hashed = {}, False, {}
        self._check_names()
        has_table = object_store.exists(self.output_dir)
        if self.if_exists == "error" and (has_table or self._location.is_used()):
            refuse_used(self.output_dir)
        if not has_table:
            self._previous = PreviousTable()
            self._location.refuse_files()
            return
        if self.if_exists == "overwrite":
            return
        found = Table(self.output_dir)
        if found.version != self._previous.version:
            self._previous = PreviousTable.of(found)
        self.finished = {entry.image_id: entry for entry in self._previous.entries if isinstance(entry, ImageEntry)}
        self._hashed = self._check_finished(self.output_dir, lambda: found.record.settings)
        self.finished |= self._hashed
        self.complete = (
            self._location.has_metadata()
            and not self.pending
            and not self._hashed
            and self.failures.keys() <= {entry.image_id for entry in self._previous.entries}
        )

    def _check_names(self) -> None:
        names = [entry.file_name for entry in self.images.values()]
        names += [entry.file_name for entry in self.failures.values()]
        for name in names:
            if _SURROGATE.search(name):
                raise InputError(
                    f"The name of {name!r} is not valid UTF-8, so a table cannot store it. Rename the file, "
                    "or use writer.layout=files."
                )

    def begin(self) -> None:
        """Claim the table: create it or clean up after a dead run, and register this run.

        Raises:
            BusyError: Another run is at work in the folder.
            OSError: The table cannot be written.
        """
        self._location.take()
        new = self._create()
        found = new or Table(self.output_dir)
        overwrite = self.if_exists == "overwrite"
        if not new and not overwrite and found.version != self._previous.version:
            self.inspect()  # Another run has begun since.
        start_over = overwrite or (not new and not self.finished and self._has_other_settings(found))
        self._location.remove_metadata()
        if start_over:
            found.empty(self._schema)
        tried_again = self.images.keys() | self.failures.keys()
        found.delete([row for entry, row in found.entries(skipped=True) if entry.image_id in tried_again])
        found.record_hashes({image_id: str(entry.image_sha256) for image_id, entry in self._hashed.items()})
        self.token = uuid.uuid4().hex
        num_planned = len(self.finished.keys() | self.images.keys())
        begun = datetime.now(timezone.utc).isoformat()
        found.configure({_RUN + self.token: begun, PLANNED: str(num_planned)})

    def _has_other_settings(self, found: Table) -> bool:
        """Return whether a table without images was made by a run with other settings.

        Raises:
            BusyError: That run may still be at work.
        """
        differences = self.record.settings.differences(found.record.settings)
        others = [begun for name, begun in found.config.items() if name.startswith(_RUN)]
        if differences and not self._location.exclusive and any(map(_is_recent, others)):
            raise BusyError(
                f"{self.output_dir} was begun with other settings, perhaps by a run that is still at work: "
                f"{'; '.join(differences)}. Choose another output_dir or, if that run is dead, "
                "writer.if_exists=overwrite."
            )
        return bool(differences)

    def _create(self) -> Table | None:
        """Create the table, and return it; return None if there is one already."""
        if object_store.exists(self.output_dir):
            return None
        try:
            return Table.create(self.output_dir, self._schema)
        except OSError:
            if object_store.exists(self.output_dir):  # Another run created it first.
                return None
            raise

    def join(self, rank: int) -> None:
        """Start this rank."""
        self._location.join(rank)
        self._rows = RowWriter(self.output_dir, Table(self.output_dir).schema, self._commit_seconds)
        if rank == 0:
            for failure in self.failures.values():
                self._rows.add((failure, {}))

    def shares_folder(self, token: str) -> bool:
        """Return whether this rank sees the run that rank 0 began, so that both write to the same table."""
        return object_store.exists(self.output_dir) and _RUN + token in Table(self.output_dir).config

    def unseen(self, world_size: int) -> list[str | None]:
        """Return, for each rank, why this process cannot see that it is alive, or None. All ranks must have joined."""
        return self._location.unseen(world_size)

    def save(self, image_id: int, tensors: Mapping[str, Tensor], features: FeatureSizes) -> int:
        """Add an image's row, to be committed soon, and return its size in bytes. Any thread may call it."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        index = tensors.get(QUERY_INDEX)
        num_queries = None if index is None else len(index)
        self._add(replace(self.images[image_id], features=features, num_queries=num_queries), tensors)
        return size

    def fail(self, image_id: int, reason: str) -> None:
        """Add a row for an image that was skipped."""
        self._add(SkippedImage(image_id, self.images[image_id].file_name, reason), {})

    def leave(self, done: bool) -> None:
        """End this rank; if `done`, it has processed all its images, and the waiting rows are committed first."""
        if done:
            assert self._rows is not None, "join comes first"
            self._rows.flush(commit=True)
        self._location.leave(done)

    def release(self) -> None:
        """Release the folder without finishing."""
        self._location.release()

    def finish(self, world_size: int) -> Metadata:
        """Wait for all ranks, check that no image is missing, compact the table, and write and return the metadata.

        Raises:
            IncompleteError: A planned image has no row.
            RuntimeError: A rank ended early.
        """
        self._location.await_ranks(world_size, self.images.keys())
        entries = self._count()
        refuse_missing(self.output_dir, sorted(self.images.keys() - entries.keys()), len(self.images), "row")
        self._tidy()
        metadata = Metadata(
            run=self.record,
            images=[entry for entry in entries.values() if isinstance(entry, ImageEntry)],
            failed=[entry for entry in entries.values() if isinstance(entry, SkippedImage)],
            layout=LANCE,
        )
        self._location.finish(metadata)
        return metadata

    def _add(self, entry: ImageEntry | SkippedImage, tensors: Mapping[str, Tensor]) -> None:
        assert self._rows is not None, "join comes first"
        self._rows.add((entry, tensors))

    def _count(self) -> dict[int, ImageEntry | SkippedImage]:
        """Return the entry of each image, ascending by id, and remove duplicate rows."""
        found = Table(self.output_dir)
        kept: dict[int, tuple[ImageEntry | SkippedImage, int]] = {}
        surplus = []
        for entry, row in found.entries():
            first, first_row = kept.setdefault(entry.image_id, (entry, row))
            if first is not entry:
                better = isinstance(first, SkippedImage) and isinstance(entry, ImageEntry)
                surplus.append(first_row if better else row)
                if better:
                    kept[entry.image_id] = entry, row
        found.delete(surplus)
        return {image_id: kept[image_id][0] for image_id in sorted(kept)}

    def _tidy(self) -> None:
        """Join small fragments, index the ids, and remove old versions unless another run may need them."""
        found = Table(self.output_dir)
        found.optimise(BUFFER)
        runs = {name: begun for name, begun in found.config.items() if name.startswith(_RUN)}
        own = _RUN + str(self.token)
        alone = self._location.exclusive or not any(_is_recent(runs[name]) for name in runs if name != own)
        found.configure(dict.fromkeys([*runs, PLANNED] if alone else [own]))
        if alone:
            found.remove_old_versions()


def _is_recent(begun: str) -> bool:
    with contextlib.suppress(ValueError):
        return datetime.now(timezone.utc) - datetime.fromisoformat(begun) < STALE
    return False
