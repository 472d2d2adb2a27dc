"""The base class of extraction runs in all layouts: the plan, and the steps of a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from detr_lightning.extraction.checks import (
    HashFiles,
    Place,
    refuse_changed_files,
    refuse_other_images,
    refuse_other_settings,
)
from detr_lightning.format.entries import ImageEntry, SkippedImage
from detr_lightning.format.identity import RunSettings
from detr_lightning.format.keys import FeatureSizes
from detr_lightning.format.schema import Metadata, RunRecord


class PlannedRun(ABC):
    """One run of an extraction. Rank 0 inspects, begins and finishes; every rank joins, saves and leaves.

    Args:
        record: The metadata without the images.
        images: The planned images.
        failures: Planned images that cannot be read.
        if_exists: `resume`, `overwrite` or `error`.
        hash_files: If given, checks that the files of finished images have not changed since they were extracted.

    Attributes:
        token: Identifies this run, once it has begun.
        finished: After `inspect`, the entries of the images that need not be computed, by id.
        complete: After `inspect`, whether nothing is left to do.
    """

    def __init__(
        self,
        record: RunRecord,
        images: Iterable[ImageEntry],
        failures: Iterable[SkippedImage] = (),
        if_exists: str = "resume",
        hash_files: HashFiles | None = None,
    ) -> None:
        self.record = record
        self.images = {entry.image_id: entry for entry in images}
        self.failures = {entry.image_id: entry for entry in failures}
        self.if_exists = if_exists
        self.hash_files = hash_files
        self.token: str | None = None
        self.finished: dict[int, ImageEntry] = {}
        self.complete = False

    @property
    def pending(self) -> list[ImageEntry]:
        """The planned images that are not finished."""
        return [entry for image_id, entry in self.images.items() if image_id not in self.finished]

    def _check_finished(self, output_dir: Place, earlier: Callable[[], RunSettings]) -> dict[int, ImageEntry]:
        """Check that the finished images belong to this run.

        Args:
            output_dir: The output folder or URL, for messages.
            earlier: Returns the settings they were extracted with.

        Returns:
            The entries that lacked the sha256 of their image's file, with it.

        Raises:
            InputError: They were extracted with other settings or from other images, or a file has changed since.
        """
        if not self.finished:
            return {}
        refuse_other_settings(output_dir, self.finished, earlier, self.record.settings)
        turned = self.record.settings.preprocessing.get("exif") == "apply"
        refuse_other_images(output_dir, self.finished, self.images, turned)
        if self.hash_files is None:
            return {}
        return refuse_changed_files(output_dir, self.finished, self.images, self.hash_files)

    @abstractmethod
    def inspect(self) -> None:
        """Find the finished images, and change nothing.

        Raises:
            OSError: The output folder cannot be used or read.
            FileExistsError: It is not empty, and `if_exists` is `error`.
            InputError: It contains an extraction with another layout, or with other settings or images.
        """

    @abstractmethod
    def begin(self) -> None:
        """Claim the output folder: refuse if another run is using it, and clean up after a dead one.

        Raises:
            BusyError: Another run is at work in it.
            OSError: It cannot be written.
        """

    @abstractmethod
    def join(self, rank: int) -> None:
        """Start this rank."""

    @abstractmethod
    def shares_folder(self, token: str) -> bool:
        """Return whether this rank sees the run that rank 0 began, so that both write to the same place."""

    @abstractmethod
    def unseen(self, world_size: int) -> list[str | None]:
        """Return, for each rank, why this process cannot see that it is alive, or None. All ranks must have joined."""

    @abstractmethod
    def save(self, image_id: int, tensors: Mapping[str, Tensor], features: FeatureSizes) -> int:
        """Save an image's tensors, and return their size in bytes. Any thread may call it."""

    @abstractmethod
    def fail(self, image_id: int, reason: str) -> None:
        """Record that an image was skipped."""

    @abstractmethod
    def leave(self, done: bool) -> None:
        """End this rank; `done` records that it has processed all its images."""

    @abstractmethod
    def release(self) -> None:
        """Release the output folder without finishing."""

    @abstractmethod
    def finish(self, world_size: int) -> Metadata:
        """Wait for all ranks, check that no image is missing, and write and return the metadata.

        Raises:
            IncompleteError: A planned image is missing.
            RuntimeError: A rank ended early.
        """
