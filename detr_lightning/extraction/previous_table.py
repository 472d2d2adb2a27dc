"""The record that earlier runs left in a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from detr_lightning.format import object_store
from detr_lightning.format.entries import ImageEntry, SkippedImage
from detr_lightning.format.table import Table


@dataclass(frozen=True)
class PreviousTable:
    """The record of earlier runs in a table.

    Attributes:
        version: The version of the table that was read; None if there is no table.
        entries: The entries of finished and skipped images.
    """

    version: int | None = None
    entries: Sequence[ImageEntry | SkippedImage] = ()

    @classmethod
    def read(cls, output_dir: str) -> PreviousTable:
        """Read an output folder or URL, which need not contain a table."""
        return cls.of(Table(output_dir)) if object_store.exists(output_dir) else cls()

    @classmethod
    def of(cls, table: Table) -> PreviousTable:
        """Read a table."""
        return cls(table.version, [entry for entry, _ in table.entries()])

    @property
    def known(self) -> dict[str, ImageEntry | SkippedImage]:
        """The entries by file name."""
        return {entry.file_name: entry for entry in self.entries}
