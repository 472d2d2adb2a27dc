"""How a command ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Ran(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


RunCLI = Callable[..., Ran]
"""Runs the command with these arguments in this process."""
