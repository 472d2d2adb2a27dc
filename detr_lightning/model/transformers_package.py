"""transformers, where it is installed: the other detectors' networks and image processors are its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from detr_lightning.errors import MissingPackageError

MIN_TRANSFORMERS = "5.9"
"""The lowest release that has all of `family.MODEL_TYPES`."""

INSTALL = "pip install 'detr-lightning[family]'"


def import_transformers(model_type: str) -> Any:
    """Return transformers, if it is installed and knows the model.

    Raises:
        MissingPackageError: It is not; the message has the command that installs it.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingPackageError(
            f"A {model_type} needs transformers {MIN_TRANSFORMERS} or later: {INSTALL}."
        ) from error
    if model_type not in transformers.CONFIG_MAPPING:
        raise MissingPackageError(
            f"A {model_type} needs transformers {MIN_TRANSFORMERS} or later, and {transformers.__version__} is "
            f"installed: {INSTALL}."
        )
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return transformers


@contextmanager
def without_report(transformers: Any) -> Iterator[None]:
    """Keep transformers from also printing the problems that this package raises as errors."""
    logging = transformers.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
