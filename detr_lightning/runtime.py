"""What torch and the C library do by default that costs a model on a CPU its time, done otherwise."""

from __future__ import annotations

import ctypes
import functools
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""From glibc's `malloc.h`; see mallopt(3)."""


@functools.cache
def keep_freed_memory() -> None:
    """Let this process keep what it frees for its next allocations, where the C library is glibc.

    A feature map of DETR's first stage takes 55 MB in float32. By default glibc hands blocks of this size back to the
    system when they are freed, and the system clears every page anew for the next image: a tenth of an image's time.
    It holds for the whole process and cannot be undone, and the process stays as large as it has been.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


class SideThreads(ThreadPoolExecutor):
    """Threads that work beside the model, each of them running torch on one core.

    By default each thread that calls a torch operator gets a team of OpenMP threads, one for each core, that go on
    spinning for a while when the operator is done, on the cores that the model computes on.

    Args:
        number: How many threads.
        name: What their names begin with.
    """

    def __init__(self, number: int, name: str) -> None:
        super().__init__(number, thread_name_prefix=name, initializer=_take_one_core)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the threads; see `concurrent.futures.Executor.shutdown`."""
        super().shutdown(wait, cancel_futures=cancel_futures)
        # Setting it in one thread also set what later threads would begin with.
        torch.set_num_threads(torch.get_num_threads())


def _take_one_core() -> None:
    torch.get_num_threads()  # A thread's first use of torch takes the process's latest number: before, not after.
    torch.set_num_threads(1)
