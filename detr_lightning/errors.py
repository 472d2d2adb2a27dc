"""The errors and the warning of this package, and helpers for their messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

SHOWN = 10
"""The maximum number of skipped images that a message names; metadata.json lists all of them."""


KEPT = "What is finished is kept: run the same command again to go on."
"""The end of an interrupted run's message."""


class DETRLightningError(Exception):
    """The base class of all errors raised on purpose. The command prints their message, without a traceback."""


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
    """An image id that is not in a store."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError.__str__ puts the message in quotes.


class BusyError(DETRLightningError, RuntimeError):
    """Another run is using the folder."""


class IncompleteError(DETRLightningError, RuntimeError):
    """A run ended without all of its images."""


class MissingPackageError(DETRLightningError, ImportError):
    """An optional package that is not installed; the message has the command that installs it."""


class DETRLightningWarning(UserWarning):
    """A warning about results that the user may not have intended. The command prints only its message."""


def check_choice(name: str, value: str, allowed: Iterable[str]) -> str:
    """Return `value` if it is allowed.

    Args:
        name: The setting, as the user writes it.
        value: The given value.
        allowed: All allowed values.

    Raises:
        SettingError: `value` is not in `allowed`; the closest name is suggested.
    """
    allowed = list(allowed)
    if value in allowed:
        return value
    raise SettingError(f"{name} is {value!r}, which is not one of {', '.join(allowed)}.{did_you_mean(value, allowed)}")


def did_you_mean(name: object, allowed: Iterable[str]) -> str:
    """Return ` Did you mean '...'?` with the allowed name closest to `name`, or an empty string if none is close."""
    near = difflib.get_close_matches(str(name), list(allowed), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def count(number: int, noun: str) -> str:
    """Return a number with its noun, such as `1 image` or `5 images`."""
    ending = "es" if noun.endswith("s") else "s"
    return f"{number} {noun}" + ending * (number != 1)
