"""Every kind of error that is raised on purpose, and the words that several messages share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

SHOWN = 10
"""Skipped images that a message names; metadata.json lists them all."""


class DETRLightningError(Exception):
    """The base of all errors that are raised on purpose. The command prints their message, without a traceback."""


class SettingError(DETRLightningError, ValueError):
    """A setting or argument that is not allowed, or that contradicts another one."""


class SettingTypeError(DETRLightningError, TypeError):
    """A setting or argument of a type that is not allowed, or one that does not exist."""


class InputError(DETRLightningError, ValueError):
    """A file or folder whose content cannot be used: annotations, weights, an extraction."""


class UnreadableImageError(InputError):
    """An image file that cannot be used. `reason` is the message without the file's name."""

    def __init__(self, message: str, reason: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason or message


class UnknownImageError(DETRLightningError, KeyError):
    """An image id that a store does not hold."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError's own puts the message in quotes.


class BusyError(DETRLightningError, RuntimeError):
    """Another run is at work in the folder."""


class IncompleteError(DETRLightningError, RuntimeError):
    """A run ended without all of its images."""


class MissingPackageError(DETRLightningError, ImportError):
    """An optional package that is not installed; the message has the command that installs it."""


class DETRLightningWarning(UserWarning):
    """Warns of results that the user may not have meant. The command prints the message alone."""


def check_choice(name: str, value: str, allowed: Iterable[str]) -> str:
    """Return `value` if it is allowed.

    Args:
        name: The setting, as the user writes it.
        value: The value that was given.
        allowed: All allowed values.

    Raises:
        SettingError: `value` is not among `allowed`; the nearest name is suggested.
    """
    allowed = list(allowed)
    if value in allowed:
        return value
    raise SettingError(f"{name} is {value!r}, which is none of {', '.join(allowed)}.{did_you_mean(value, allowed)}")


def did_you_mean(name: object, allowed: Iterable[str]) -> str:
    """Return ` Did you mean '...'?` with the allowed name nearest to one that is not; nothing where none is near."""
    near = difflib.get_close_matches(str(name), list(allowed), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def count(number: int, noun: str) -> str:
    """Return a number with its noun, such as `1 image` or `5 images`."""
    ending = "es" if noun.endswith("s") else "s"
    return f"{number} {noun}" + ending * (number != 1)
