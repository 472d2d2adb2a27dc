"""This package's warnings as the command prints them."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from detr_lightning.errors import DETRLightningWarning


@contextlib.contextmanager
def plain_warnings(printed: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Print this package's warnings as one line, without the file name and line number.

    Args:
        printed: Whether they are printed at all, asked for each warning.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("always", DETRLightningWarning)
        show = warnings.showwarning

        def show_plain(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if not issubclass(category, DETRLightningWarning):
                show(message, category, *place, **more)
            elif printed():
                print(f"Warning: {message}", file=sys.stderr, flush=True)

        warnings.showwarning = show_plain
        yield
