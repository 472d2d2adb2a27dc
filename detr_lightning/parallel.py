"""Work on many files in threads, with a progress bar if it takes long."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

LONG_FILES = 1000
LONG_SECONDS = 2.0
_BLOCK = 1024
_UPDATE_SECONDS = 0.1
"""The time between two updates of the bar. An update takes about as long as reading a file."""


def track(items: Iterable[T], total: int, description: str, progress: bool | None = None) -> Iterator[T]:
    """Yield the items, with a progress bar if the work takes long.

    Args:
        items: The items.
        total: The number of items.
        description: The activity, shown before the bar.
        progress: True for a bar from the start, False for none, None for one when there are more than 1000 items or
            two seconds have passed.
    """
    if progress is False:
        yield from items
        return
    from rich.console import Console
    from rich.progress import Progress

    begun = updated = time.monotonic()
    bar = Progress(console=Console(stderr=True), transient=True)
    task = bar.add_task(description, total=total)
    shown = bool(progress) or total > LONG_FILES
    with contextlib.ExitStack() as stack:
        if shown:
            stack.enter_context(bar)
        for done, item in enumerate(items, start=1):
            yield item
            now = time.monotonic()
            if now - updated < _UPDATE_SECONDS and done != total:
                continue
            updated = now
            bar.update(task, completed=done)
            if not shown and now - begun > LONG_SECONDS:
                shown = True
                stack.enter_context(bar)


def in_threads(
    function: Callable[[T], R], items: Sequence[T], workers: int, description: str, progress: bool | None = None
) -> Iterator[R]:
    """Yield `function(item)` in the items' order, computed by threads, with `track`'s progress bar.

    The threads receive the items in blocks, so that a million items do not wait in memory.
    """

    def results() -> Iterator[R]:
        with ThreadPoolExecutor(workers) as threads:
            for begin in range(0, len(items), _BLOCK):
                yield from threads.map(function, items[begin : begin + _BLOCK])

    yield from track(results(), len(items), description, progress)
