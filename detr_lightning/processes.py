"""How the processes of a run end: when asked to, and not long after the one that launched them."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

LAUNCHER = "DETR_LIGHTNING_LAUNCHER"
"""The environment variable that holds the process which launched the other ranks of its node."""


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """End as orderly on SIGTERM as on Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def end_with_parent() -> None:
    """End a rank within seconds of the process that launched it: nobody else would."""
    by_torchrun, by_rank_0 = "TORCHELASTIC_RUN_ID" in os.environ, int(os.environ.get("LOCAL_RANK", "0")) > 0
    parent = os.getppid()
    if by_rank_0 and not by_torchrun:
        parent = int(os.environ.get(LAUNCHER, parent))  # It may have died while this process imported.
    os.environ[LAUNCHER] = str(os.getpid())
    if not (by_torchrun or by_rank_0) or any(thread.name == "parent-watch" for thread in threading.enumerate()):
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
