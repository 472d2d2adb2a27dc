"""What an unfinished run keeps beside its files: who is at work, what was asked for, what is done.

Everything lies in the subfolder `.extraction`, which goes when the run finishes:

    run.json        what identifies the run, and the images it plans
    lock            held by rank 0 while it lives
    done.jsonl      the images that were finished when the run began
    rank-N.jsonl    what rank N has done since, held by it while it lives

Holding is the operating system's file lock: it ends with its process, however that ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from detr_lightning.errors import BusyError
from detr_lightning.format.state import DONE, read_journal

PATIENCE = 60.0
"""Seconds that a new run waits for processes of a dead one. Without their parent they stop within a few."""


class Held:
    """A text file that this process holds until it ends or lets go: a lock, and a sign of life.

    Raises:
        BusyError: Another process holds it; the message is the file's first line.
        OSError: It cannot be opened, or its file system has no locks.
    """

    def __init__(self, path: Path) -> None:
        while True:
            self.file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - stays open
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.file.seek(0)
                holder = self.file.readline().strip()
                self.file.close()
                raise BusyError(holder) from None
            except OSError as error:
                self.file.close()
                raise OSError(
                    error.errno,
                    f"{path} cannot be locked ({error.strerror}), so two runs could get into each other's way. "
                    "Choose an output_dir on a file system that has locks (flock).",
                ) from error
            # Whoever held it before may have deleted it in the meantime.
            if path.exists() and os.path.samestat(os.fstat(self.file.fileno()), path.stat()):
                break
            self.file.close()
        # A forked child, such as a data worker, would go on holding it after its parent's death.
        os.register_at_fork(after_in_child=self.file.close)

    def sign(self) -> None:
        """Write who holds the file."""
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self.file.flush()


class Journal:
    """What one rank has done: a line for each image, written after the image's file is whole.

    Args:
        path: A new file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held = Held(path)
        self._lock = threading.Lock()

    def add(self, entry: dict[str, Any]) -> None:
        """Append an entry; any thread may call it.

        Raises:
            OSError: It cannot be written; the message names the file.
        """
        line = json.dumps(entry) + "\n"
        with self._lock:
            try:
                self._held.file.write(line)
                self._held.file.flush()
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"{error.strerror}: {self._path} needs {len(line)} bytes. "
                    "Free some space or lift the limit, then run the same command again.",
                ) from error

    def close(self, done: bool) -> None:
        """Let go; `done` says that the rank has been through all it was given."""
        if not self._held.file.closed:
            if done:
                self.add(DONE)
            with contextlib.suppress(OSError):  # What add could not write, and has said so, it would try again.
                self._held.file.close()


def is_held(path: Path) -> bool:
    """Return whether a living process holds a file."""
    try:
        with open(path, encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def hold(path: Path, others: list[Path]) -> Held:
    """Hold a folder's lock, once the processes of a run that died have stopped.

    Args:
        path: The lock.
        others: Files that such processes may still hold.

    Raises:
        BusyError: Another run is at work, or some process of a dead one does not stop.
    """
    try:
        held = Held(path)
    except BusyError as error:
        raise BusyError(
            f"{path.parent.parent} is in use by another extraction ({error}). "
            "Wait until it has finished, or choose another output_dir."
        ) from None
    held.sign()
    end = time.monotonic() + PATIENCE
    for other in others:
        while is_held(other):
            if time.monotonic() > end:
                held.file.close()
                raise BusyError(
                    f"{other} is still held by a process of an earlier run, {PATIENCE:.0f} s after its first "
                    "process ended. Stop it, then run the same command again."
                )
            time.sleep(0.2)
    return held


def await_done(journals: list[Path]) -> None:
    """Wait until each rank has been through all it was given. It may take hours, so nothing here times out.

    Raises:
        RuntimeError: A rank's process ended before.
    """
    for journal in journals:
        while is_held(journal):
            time.sleep(0.2)
        if not any(entry == DONE for entry in read_journal(journal)):
            raise RuntimeError(
                f"{journal.stem} ended before it was through with its images. "
                "What is finished is kept: run the same command again to go on."
            )
