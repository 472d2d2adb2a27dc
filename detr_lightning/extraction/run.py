"""The run of an extraction into a folder with one file per image."""

from __future__ import annotations

import contextlib
import json
import shutil
import uuid
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from detr_lightning.errors import DETRLightningWarning, count
from detr_lightning.extraction.checks import HashFiles, refuse_missing, refuse_used
from detr_lightning.extraction.journal import Journal, await_done, why_unseen
from detr_lightning.extraction.locks import LockedFile, lock_folder, remove_state, sweep
from detr_lightning.extraction.planned import PlannedRun
from detr_lightning.extraction.previous import PreviousRun, check_folder, read_previous, stamp
from detr_lightning.format.archive import WholeFiles
from detr_lightning.format.entries import ImageEntry, SkippedImage
from detr_lightning.format.files import fsync_folder, replacing, save_tensors, write_json
from detr_lightning.format.keys import QUERY_INDEX, FeatureSizes
from detr_lightning.format.names import METADATA, RUN, STATE, TEMPORARY, file_name, is_url
from detr_lightning.format.schema import Metadata, RunRecord
from detr_lightning.format.state import read_entries, run_to_json, token_of
from detr_lightning.parallel import track

IF_EXISTS = ("resume", "overwrite", "error")
"""The values of `writer.if_exists`."""


class ExtractionRun(PlannedRun):
    """One run of an extraction into a folder of files.

    Args:
        folder: The output folder; it may not exist yet.
        record: The metadata without the images.
        images: The planned images.
        failures: Planned images that cannot be read.
        if_exists: `resume`, `overwrite` or `error`.
        hash_files: If given, checks that the files of finished images have not changed since they were extracted.
        previous: The result of `read_previous`, if it was called; the folder is read again if it has changed.
    """

    def __init__(
        self,
        folder: Path,
        record: RunRecord,
        images: Iterable[ImageEntry],
        failures: Iterable[SkippedImage] = (),
        if_exists: str = "resume",
        hash_files: HashFiles | None = None,
        previous: PreviousRun | None = None,
    ) -> None:
        super().__init__(record, images, failures, if_exists, hash_files)
        self.folder = Path(folder)
        self._previous = previous or PreviousRun()
        self._lock: LockedFile | None = None
        self._journal: Journal | None = None

    def inspect(self) -> None:
        """Find the finished images, and change nothing.

        Raises:
            OSError: The folder is a file or cannot be read.
            FileExistsError: It is not empty, and `if_exists` is `error`.
            InputError: It contains an extraction with another layout, or with other settings or images.
        """
        folder = self.folder
        check_folder(folder)
        self.finished, self.complete = {}, False
        if self.if_exists == "error" and folder.exists() and any(folder.iterdir()):
            refuse_used(folder)
        if stamp(folder) != self._previous.stamp:
            self._previous = read_previous(folder)
        previous = self._previous
        if self.if_exists == "overwrite":
            return
        entries = track(previous.finished.items(), len(previous.finished), "Checking files")
        self.finished = WholeFiles().among(folder, entries)
        if lost := [entry for i, entry in previous.finished.items() if i not in self.finished and i not in self.images]:
            warnings.warn(
                f"{folder} has {count(len(lost), 'image')} that this run does not plan and whose file is missing or "
                f"damaged, such as {lost[0].file_name!r}: metadata.json will no longer list them.",
                DETRLightningWarning,
                stacklevel=2,
            )
        hashed = self._check_finished(folder, lambda: previous.settings)
        self.finished |= hashed
        self.complete = (
            (folder / METADATA).exists()
            and not (folder / STATE / RUN).exists()
            and not self.pending
            and not hashed
            and self.failures.keys() <= previous.failed.keys() | self.finished.keys()
        )

    def begin(self) -> None:
        """Claim the folder: refuse if another run is using it, clean up after a dead one, and record the plan.

        Raises:
            BusyError: Another run is at work in the folder.
            OSError: The folder cannot be written.
        """
        existed = self.folder.exists()
        self._lock = lock_folder(self.folder)
        try:
            self._begin()
        except BaseException:
            self.release()
            if not existed:
                with contextlib.suppress(OSError):  # It is not empty.
                    self.folder.rmdir()
            raise

    def _begin(self) -> None:
        state = self.folder / STATE
        if stamp(self.folder) != self._previous.stamp:
            self.inspect()  # Another run has begun, and ended, since.
        for leftover in (*self.folder.glob(TEMPORARY), *state.glob(TEMPORARY)):
            leftover.unlink(missing_ok=True)
        sweep(self.folder)
        if self.if_exists == "overwrite" or self._previous.void:
            self._forget()
        with replacing(state / "done.jsonl") as file:
            # A skipped image that is planned again is tried again.
            failed = {i: entry for i, entry in self._previous.failed.items() if i not in self.images}
            kept: list[ImageEntry | SkippedImage] = [*failed.values(), *self.finished.values()]
            for entry in kept:
                file.write(json.dumps(entry.to_json()).encode() + b"\n")
        for journal in state.glob("rank-*.jsonl"):
            journal.unlink()
        self.token = uuid.uuid4().hex
        self._previous.recorded |= self.images.keys()
        num_planned = len(self.finished.keys() | self.images.keys())
        write_json(state / RUN, run_to_json(self.token, self._previous.recorded, self.record, num_planned))
        (self.folder / METADATA).unlink(missing_ok=True)

    def join(self, rank: int) -> None:
        """Open this rank's journal."""
        self._journal = Journal(self.folder / STATE / f"rank-{rank}.jsonl")

    def shares_folder(self, token: str) -> bool:
        """Return whether this rank sees the run that rank 0 began, so that both write to the same folder."""
        return token_of(self.folder) == token

    def unseen(self, world_size: int) -> list[str | None]:
        """Return, for each rank, why this process cannot see that it is alive, or None. All ranks must have joined."""
        journals = [self.folder / STATE / f"rank-{rank}.jsonl" for rank in range(world_size)]
        return [why_unseen(journal) for journal in journals]

    def save(self, image_id: int, tensors: Mapping[str, Tensor], features: FeatureSizes) -> int:
        """Write an image's file and then its entry, and return the file's size in bytes. Any thread may call it."""
        saved = save_tensors(self.folder, image_id, tensors)
        index = tensors.get(QUERY_INDEX)
        entry = replace(
            self.images[image_id],
            features=features,
            bytes=saved.bytes,
            checksum=saved.checksum,
            num_queries=None if index is None else len(index),
        )
        self._write(entry)
        return saved.bytes

    def fail(self, image_id: int, reason: str) -> None:
        """Record that an image was skipped."""
        self._write(SkippedImage(image_id, self.images[image_id].file_name, reason))

    def leave(self, done: bool) -> None:
        """Close this rank's journal; `done` records that the rank has processed all its images."""
        if self._journal is not None:
            self._journal.close(done)

    def release(self) -> None:
        """Release the folder without finishing. A run that has not begun leaves nothing behind."""
        if self._lock is not None and not self._lock.closed:
            if (self.folder / STATE / RUN).exists():
                self._lock.close()
            else:
                remove_state(self.folder, self._lock)

    def finish(self, world_size: int) -> Metadata:
        """Wait for all ranks, check that no image is missing, and write and return the metadata.

        Raises:
            IncompleteError: A planned image has neither a whole file nor a reason why it was skipped.
            RuntimeError: A rank ended early.
        """
        state = self.folder / STATE
        await_done([state / f"rank-{rank}.jsonl" for rank in range(world_size)])
        entries, failed = read_entries(self.folder)
        failed |= self.failures
        before = {image_id: entry for image_id, entry in entries.items() if image_id in self.finished}
        new = [(image_id, entry) for image_id, entry in entries.items() if image_id not in self.finished]
        whole = before | WholeFiles().among(self.folder, new)
        missing = sorted(self.images.keys() - whole.keys() - failed.keys())
        refuse_missing(self.folder, missing, len(self.images))
        for image_id in self._previous.recorded - whole.keys():  # Files that a killed process wrote but did not record.
            (self.folder / file_name(image_id)).unlink(missing_ok=True)
        metadata = Metadata(
            run=self.record,
            images=[whole[image_id] for image_id in sorted(whole)],
            failed=[failed[image_id] for image_id in sorted(failed.keys() - whole.keys())],
        )
        fsync_folder(self.folder)
        write_json(self.folder / METADATA, metadata.to_json(), checksum=True)
        assert self._lock is not None, "begin comes first"
        remove_state(self.folder, self._lock)
        fsync_folder(self.folder)
        return metadata

    def _write(self, entry: ImageEntry | SkippedImage) -> None:
        assert self._journal is not None, "join comes first"
        self._journal.add(entry.to_json())

    def _forget(self) -> None:
        """Remove the files of earlier runs, and no others. If this is interrupted, the next run continues it."""
        self._previous.failed = {}
        for journal in (self.folder / STATE).glob("*.jsonl"):
            journal.unlink()
        write_json(self.folder / STATE / RUN, run_to_json(uuid.uuid4().hex, self._previous.recorded, None))
        (self.folder / METADATA).unlink(missing_ok=True)
        for image_id in self._previous.recorded:
            (self.folder / file_name(image_id)).unlink(missing_ok=True)


def free_bytes(output_dir: Path | str) -> int | None:
    """Return the free bytes on the file system of a folder, which need not exist yet; None for a URL."""
    if is_url(output_dir):
        return None
    folder = Path(output_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
