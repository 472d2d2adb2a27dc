"""File locks, which show the processes at work in an output folder.

The operating system releases a lock when its process ends, however that ends. Rank 0 locks the folder, and each rank
its journal.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import time
import uuid
from pathlib import Path

from detr_lightning.errors import BusyError
from detr_lightning.format.names import STATE
from detr_lightning.format.state import no_link

PATIENCE = 60.0
"""Seconds that a new run waits for the processes of a dead one. Without their parent they stop within a few seconds."""

_inherited: set[int] = set()
"""Descriptors of this process's locks, which a forked child must not keep."""


def _close_inherited() -> None:
    # Closes descriptors, not file objects: each of those has a lock, which another thread may have held at the fork.
    for descriptor in _inherited:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _inherited.clear()


os.register_at_fork(after_in_child=_close_inherited)


class LockedFile:
    """A text file that this process keeps locked until it ends or closes it. Links are not followed.

    Raises:
        BusyError: Another process has locked it; the message is the file's first line.
        InputError: It is a link, or lies in a linked folder.
        OSError: It cannot be opened, or its file system has no locks.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        while True:
            descriptor = no_link(str(path), os.O_RDWR | os.O_APPEND | os.O_CREAT)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.pread(descriptor, 200, 0).decode(errors="replace").partition("\n")[0].strip()
                os.close(descriptor)
                raise BusyError(owner) from None
            except OSError as error:
                os.close(descriptor)
                raise _no_locks(path, error) from error
            # The process that had the lock before may have deleted or moved the file in the meantime.
            if _is_at(descriptor, path):
                break
            os.close(descriptor)
        self.descriptor = descriptor
        _inherited.add(descriptor)

    def sign(self) -> None:
        """Write this process's id and host into the file."""
        os.ftruncate(self.descriptor, 0)
        os.write(self.descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def append(self, line: bytes) -> None:
        """Append a line, whole or not at all.

        Raises:
            OSError: The line cannot be written.
        """
        before = os.fstat(self.descriptor).st_size
        rest = line
        try:
            while rest:
                rest = rest[os.write(self.descriptor, rest) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self.descriptor, before)
            raise

    def close(self) -> None:
        """Release the lock."""
        if self.descriptor in _inherited:
            _inherited.remove(self.descriptor)
            os.close(self.descriptor)
            self.descriptor = -1  # The system reuses the number for the next file.

    @property
    def closed(self) -> bool:
        """Whether the lock has been released."""
        return self.descriptor not in _inherited


def is_locked(path: Path) -> bool:
    """Return whether a living process has locked a file.

    Raises:
        InputError: It is a link, or lies in a linked folder.
        OSError: The file system does not report locks.
    """
    try:
        descriptor = no_link(str(path), os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        raise _no_locks(path, error) from error
    finally:
        os.close(descriptor)
    return False


def lock_folder(folder: Path) -> LockedFile:
    """Lock an output folder, and wait until the processes of a dead run have stopped.

    Raises:
        BusyError: Another run is at work, or a process of a dead run does not stop.
        InputError: The folder's state, or a part of it, is a link.
        OSError: The folder cannot be written, or its file system has no locks.
    """
    state = folder / STATE
    while True:
        made = [path for path in (folder, state) if not path.exists()]
        if not state.is_symlink():
            # Also raised for a folder that is moved away at this moment. For a file in its place, locking fails.
            with contextlib.suppress(FileExistsError):
                state.mkdir(parents=True, exist_ok=True)
        try:
            lock = LockedFile(state / "lock")
        except FileNotFoundError:  # A run that finished has just moved the state away.
            continue
        except BusyError as error:
            raise BusyError(
                f"{folder} is in use by another extraction ({error}). "
                "Wait until it has finished, or choose another output_dir."
            ) from None
        except OSError:
            with contextlib.suppress(OSError):
                if state in made:
                    (state / "lock").unlink(missing_ok=True)
                for path in reversed(made):
                    path.rmdir()
            raise
        break
    lock.sign()
    end = time.monotonic() + PATIENCE
    try:
        for journal in state.glob("rank-*.jsonl"):
            while is_locked(journal):
                if time.monotonic() > end:
                    raise BusyError(
                        f"{journal} is still locked by a process of an earlier run, {PATIENCE:.0f} s after its first "
                        "process ended. Stop that process, then run the same command again."
                    )
                time.sleep(0.2)
    except BaseException:
        lock.close()
        raise
    return lock


def remove_state(folder: Path, lock: LockedFile) -> None:
    """Remove the state of a run that this process has locked, and release the lock.

    The state is renamed first, so that a run that starts at this moment finds all of it or nothing: on a network file
    system, an open file such as the lock leaves a hidden one behind when it is removed.
    """
    moved = folder / f"{STATE}.{uuid.uuid4().hex}"
    (folder / STATE).rename(moved)
    lock.close()
    shutil.rmtree(moved, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove states that earlier runs renamed but could not remove."""
    for leftover in folder.glob(f"{STATE}.*"):
        if not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _no_locks(path: Path, error: OSError) -> OSError:
    return OSError(
        error.errno,
        f"{path} cannot be locked ({error.strerror}), so two runs could interfere with each other. "
        "Choose an output_dir on a file system with locks (flock).",
    )
