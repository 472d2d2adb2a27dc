"""The optional transformers package, whose networks and image processors the other detectors use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from detr_lightning.errors import MissingPackageError

MIN_TRANSFORMERS = "5.9"
"""The first release with all of `family.MODEL_TYPES`."""

INSTALL = "pip install 'detr-lightning[family]'"


def import_transformers(model_type: str) -> Any:
    """Return the transformers package.

    Raises:
        MissingPackageError: It is not installed, or too old for the model; the message has the install command.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingPackageError(
            f"A {model_type} needs transformers {MIN_TRANSFORMERS} or later: {INSTALL}."
        ) from error
    if model_type not in transformers.CONFIG_MAPPING:
        raise MissingPackageError(
            f"A {model_type} needs transformers {MIN_TRANSFORMERS} or later, but {transformers.__version__} is "
            f"installed: {INSTALL}."
        )
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return transformers


@contextmanager
def without_report(transformers: Any) -> Iterator[None]:
    """Keep transformers from printing the problems that this package raises as errors."""
    logging = transformers.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
