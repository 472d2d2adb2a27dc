"""The rows of one rank: gathered in memory, written to fragments, and committed at intervals."""

from __future__ import annotations

import threading
import time
from typing import Any

from detr_lightning.format.columns import Row
from detr_lightning.format.table import Table, write_rows

BUFFER = 64 * 2**20
"""Bytes of tensors that wait in memory before they are written to a fragment."""

TRIES = 5
"""The maximum number of attempts at a commit."""


class RowWriter:
    """Writes one rank's rows to a table.

    Args:
        output_dir: The folder or URL of the table.
        schema: Its columns.
        commit_seconds: Rows are committed once the last commit is this long ago.
    """

    def __init__(self, output_dir: str, schema: Any, commit_seconds: float) -> None:
        self.output_dir = output_dir
        self._schema = schema
        self._commit_seconds = commit_seconds
        self._rows: list[Row] = []
        self._waiting = 0
        self._fragments: list[Any] = []
        self._uncommitted: set[int] = set()
        self._committed_at = time.monotonic()
        self._filling = threading.Lock()
        self._flushing = threading.Lock()

    def add(self, row: Row) -> None:
        """Add an image's row, to be committed soon. Any thread may call it."""
        size = sum(tensor.nbytes for tensor in row[1].values())
        with self._filling:
            self._rows.append(row)
            self._waiting += size
            full = self._waiting >= BUFFER
        if full or time.monotonic() - self._committed_at >= self._commit_seconds:
            self.flush()

    def flush(self, commit: bool = False) -> None:
        """Write the waiting rows to a fragment, and commit if that is due."""
        with self._flushing:
            with self._filling:
                rows, self._rows, self._waiting = self._rows, [], 0
            if rows:
                self._fragments += write_rows(self.output_dir, self._schema, rows)
                self._uncommitted |= {entry.image_id for entry, _ in rows}
            if self._fragments and (commit or time.monotonic() - self._committed_at >= self._commit_seconds):
                self._commit()

    def _commit(self) -> None:
        """Commit the fragments. One that raises may still have landed, so a blind retry could add rows twice."""
        for left in reversed(range(TRIES)):
            try:
                Table(self.output_dir).append(self._fragments)
                break
            except OSError:
                if self._has_landed():
                    break
                if not left:
                    raise
                time.sleep(0.5)
        self._fragments, self._uncommitted, self._committed_at = [], set(), time.monotonic()

    def _has_landed(self) -> bool:
        try:
            return Table(self.output_dir).has_all(self._uncommitted)
        except OSError:
            return False
