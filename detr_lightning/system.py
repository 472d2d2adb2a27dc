"""Process-wide effects: signals, warnings, and the settings of torch, Pillow and the C library.

A run restores what it changed, except for `keep_freed_memory`, which explains why. Data workers end with their run.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""From glibc's `malloc.h`; see mallopt(3)."""

QUIET = (
    r".*does not have many workers.*",
    r".*Consider setting `persistent_workers=True`.*",  # a run has one epoch
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
    r".*multi-threaded, use of fork\(\) may lead to deadlocks.*",
    r".*AMP with fp16 is not supported on CPU.*",  # job.py refuses it
    r".*LightningCLI's args parameter is intended to run from within Python.*",
)
"""Warnings that Lightning, torch and Python give about each other. Users can do nothing about them."""


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Suppress Lightning's messages about itself, the hardware and its dependencies."""
    loggers = [logging.getLogger(name) for name in ("lightning", "lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for message in QUIET:
            warnings.filterwarnings("ignore", message=message)
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextlib.contextmanager
def restore_settings() -> Iterator[None]:
    """Restore the settings of torch and Pillow that a run changes: TensorFloat-32 and the pixel limit."""
    precision, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    max_pixels = Image.MAX_IMAGE_PIXELS
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = convolutions
        Image.MAX_IMAGE_PIXELS = max_pixels


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Disable Python's garbage collector, which would traverse millions of new objects many times.

    Plans and counts create an object per image, but no reference cycles. The collector takes up to 40 % of their time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


BFLOAT16 = {"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"}
"""Processor flags, as named by Linux; any of them means instructions for bfloat16."""


def has_instructions(precision: str, device: str, cpuinfo: str | None = None) -> bool:
    """Return whether the processor has instructions for a precision; bfloat16 without them is ten times slower.

    Args:
        precision: Lightning's precision, such as `bf16-mixed`.
        device: The type of the device, such as `cpu`.
        cpuinfo: The content of `/proc/cpuinfo`; by default, this machine's. Without it, as on systems other than Linux,
            the instructions are assumed to exist.
    """
    if device != "cpu" or "bf16" not in precision:
        return True
    if cpuinfo is None:
        with contextlib.suppress(OSError):
            cpuinfo = Path("/proc/cpuinfo").read_text()
    lines = re.findall(r"^(?:flags|Features)\s*:(.*)$", cpuinfo or "", flags=re.MULTILINE)
    return not lines or any(flag in BFLOAT16 for flag in lines[0].split())


def allow_tf32(allowed: bool) -> None:
    """Choose for the whole process whether float32 on a GPU may round its inputs to TensorFloat-32."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def keep_freed_memory() -> None:
    """Let this process keep freed memory for its next allocations, if the C library is glibc.

    A feature map of DETR's first stage takes 55 MB in float32. By default glibc hands blocks of this size back to the
    system when they are freed, and the system clears every page anew for the next image: a tenth of an image's time.
    The setting affects the whole process and cannot be undone, and the process never shrinks.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # missing in musl
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


class SideThreads(ThreadPoolExecutor):
    """Threads that work alongside the model, each of which runs torch on one core.

    By default, each thread that calls a torch operator gets a team of OpenMP threads, one per core. They keep spinning
    for a while after the operator is done, on the cores that the model needs.

    Args:
        number: The number of threads.
        name: The prefix of their names.
    """

    def __init__(self, number: int, name: str) -> None:
        super().__init__(number, thread_name_prefix=name, initializer=_take_one_core)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the threads; see `concurrent.futures.Executor.shutdown`."""
        super().shutdown(wait, cancel_futures=cancel_futures)
        # Setting the number in one thread also changed the number that later threads start with.
        torch.set_num_threads(torch.get_num_threads())


def _take_one_core() -> None:
    torch.get_num_threads()  # Do this first: a thread's first use of torch sets its number to the process's latest.
    torch.set_num_threads(1)
