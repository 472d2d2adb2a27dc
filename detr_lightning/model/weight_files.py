"""Files of weights: hashed, and read without ever running what is in them."""

from __future__ import annotations

import argparse
import hashlib
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from detr_lightning.errors import InputError


def sha256_of(files: Iterable[Path]) -> str:
    """Return the sha256 of files, as if they were one."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def read_pickled(path: Path) -> Any:
    """Read what `torch.save` wrote, in its present or its old format, tensors mapped from the file where possible.

    Nothing but tensors, plain containers and `argparse.Namespace` is accepted.

    Raises:
        ValueError: The file is none of torch's, is cut off, or asks for anything else while it is read.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    except Exception as error:  # what foreign bytes make an unpickler raise has no common type
        wanted = re.search(r"Unsupported (?:global|class|operand).*?([\w.]+\.\w+)", str(error))
        if wanted:
            raise InputError(
                f"{path} was refused: reading it would run {wanted[1]}, which weights do not need. Nothing was run. "
                "If you trust its author, load it yourself and save {'model': model.state_dict()}."
            ) from None
        raise InputError(
            f"{path} is no whole file of weights: torch cannot read it. Expected what torch.save wrote: "
            "{'model': state_dict} or a state_dict. Was it cut off while it was copied?"
        ) from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without its full stop."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__
