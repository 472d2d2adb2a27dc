"""The state of an unfinished run: the processes at work, the settings, and the finished images.

It is kept in the output folder's subfolder `.extraction`, which is removed when the run finishes:

    run.json        the settings that identify the run, and the images it plans
    lock            locked by rank 0 while it is alive
    done.jsonl      the images that were finished when the run began
    rank-N.jsonl    the images that rank N has finished since, locked by it while it is alive
"""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

from detr_lightning.errors import KEPT, InputError
from detr_lightning.extraction.locks import LockedFile, is_locked
from detr_lightning.format.state import DONE, read_journal


class Journal:
    """One rank's record: a line per image, written once the image's file is complete.

    Args:
        path: The file to create.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = LockedFile(path)
        self._lock = threading.Lock()

    def add(self, entry: dict[str, Any]) -> None:
        """Append an entry; any thread may call it.

        Raises:
            OSError: The entry cannot be written; the message names the file.
        """
        line = json.dumps(entry).encode() + b"\n"
        with self._lock:
            try:
                self._file.append(line)
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"{error.strerror}: {self._path} needs {len(line)} bytes. "
                    "Free some space or lift the limit, then run the same command again.",
                ) from error

    def close(self, done: bool) -> None:
        """Release the lock; `done` records that the rank has processed all its images."""
        if not self._file.closed:
            if done:
                self.add(DONE)
            self._file.close()


def why_unseen(journal: Path) -> str | None:
    """Return why this process cannot see that a journal's rank is alive, or None if it can."""
    try:
        if is_locked(journal):
            return None
    except (OSError, InputError) as error:
        return str(error)
    return f"its lock on {journal} is not visible to rank 0. Choose a file system with locks (flock) across nodes."


def await_done(journals: list[Path]) -> None:
    """Wait until each rank has processed all its images. This may take hours, so there is no timeout.

    Raises:
        RuntimeError: A rank's process ended before that.
        OSError: The file system no longer reports locks.
    """
    for journal in journals:
        while is_locked(journal):
            time.sleep(0.2)
        if not any(entry == DONE for entry in read_journal(journal)):
            raise RuntimeError(f"{journal.stem} ended before it had processed all its images. {KEPT}")
