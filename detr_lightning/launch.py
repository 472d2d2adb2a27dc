"""The start and end of this process: launchers such as torchrun or srun, signals, and a parent that dies.

This module imports neither torch nor Lightning, which reads the environment on import.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType

LAUNCHER = "DETR_LIGHTNING_LAUNCHER"
"""The environment variable with the process id of the rank that launched the others on its node."""

_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE")
_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
_SLURM = ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_LSF = ("JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_LOCAL_RANK")

_INTERACTIVE_STEP = 0xFFFFFFF0
"""Slurm numbers its own steps, such as the shell of salloc, from this value."""


def launched_by_rank_0() -> bool:
    """Return whether rank 0 of this node launched this process, rather than the user or a launcher such as torchrun."""
    local_rank = os.environ.get("LOCAL_RANK", "0")
    launcher = os.environ.get(LAUNCHER, str(os.getpid()))
    return launcher != str(os.getpid()) and not _by_torchrun() and local_rank not in ("", "0")


def launched_ranks() -> int | None:
    """Return how many ranks a launcher has started, or None if there was no launcher."""
    environment = os.environ
    size = environment.get("WORLD_SIZE") or (environment.get("SLURM_NTASKS") if _by_srun() else None)
    return int(size) if size and size.isdecimal() else None


def forget_stale_launchers() -> None:
    """Remove the environment variables of a launcher that did not start this process.

    Containers, cluster allocations and earlier jobs leave them in a shell. Lightning would take this process for one of
    several ranks, and print nothing or wait for the others forever.
    """
    environment = os.environ
    if _by_torchrun() or launched_by_rank_0():
        return
    stale: tuple[str, ...] = ()
    if environment.get("WORLD_SIZE") == "1":
        stale += _RANKS + _ADDRESS
    elif not environment.get("MASTER_ADDR"):
        stale += _RANKS
    elif not environment.get("WORLD_SIZE"):  # NODE_RANK stays: with an address, it starts one of several nodes.
        stale += ("RANK", "LOCAL_RANK")
    if not _by_srun():
        stale += _SLURM
    if environment.get("JSM_NAMESPACE_SIZE", "1") == "1":
        stale += _LSF
    for name in stale:
        environment.pop(name, None)


def _by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _by_srun() -> bool:
    step = os.environ.get("SLURM_STEP_ID", "")
    return step.isdecimal() and int(step) < _INTERACTIVE_STEP


def end_with_parent() -> None:
    """End this rank within seconds if the process that launched it ends: nothing else would."""
    by_rank_0 = launched_by_rank_0()
    parent = os.getppid()
    if by_rank_0:
        parent = int(os.environ[LAUNCHER])  # The parent may have died while this process was importing.
    else:
        os.environ[LAUNCHER] = str(os.getpid())
    if not (_by_torchrun() or by_rank_0) or any(thread.name == "parent-watch" for thread in threading.enumerate()):
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Handle SIGTERM like Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class InterruptibleWait:
    """A wait for other ranks inside torch, where Python cannot react, that Ctrl-C and SIGTERM can still end.

    Use it as a context manager around the wait. `close` ends it earlier.

    Args:
        message: The message to print if the process has to be ended.
        seconds: The time that Python has to react before the process is ended.
    """

    def __init__(self, message: str, seconds: float) -> None:
        self._message, self._seconds = message, seconds
        self._over = threading.Event()
        self._before = -1
        self._pipe: tuple[int, int] | None = None

    def __enter__(self) -> InterruptibleWait:
        if threading.current_thread() is threading.main_thread():
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            self._before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(self._pipe[0],), name="signal-watch", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the wait."""
        self._over.set()
        if self._pipe is not None:
            signal.set_wakeup_fd(self._before)
            os.close(self._pipe[1])  # which ends the thread
            self._pipe = None

    def _watch(self, end: int) -> None:
        with os.fdopen(end, "rb", buffering=0) as signals:
            while number := signals.read(1):
                if number[0] in (signal.SIGINT, signal.SIGTERM) and not self._over.wait(self._seconds):
                    if self._message:
                        print(self._message, file=sys.stderr, flush=True)
                    os._exit(130)
