"""Weight files: hashing them, and reading them without running any code in them."""

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
    """Return the sha256 of the concatenated files."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


class _Inert(dict[Any, Any]):
    """Stands in for other objects that training scripts save beside weights, and does nothing."""

    def __new__(cls, *_args: Any) -> _Inert:
        return dict.__new__(cls)

    def __init__(self, *_args: Any) -> None:
        pass

    def __setstate__(self, _state: Any) -> None:
        pass


BESIDE_WEIGHTS = (
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "pathlib.PosixPath",
    "pathlib.PurePosixPath",
    "pathlib.WindowsPath",
    "pathlib.PureWindowsPath",
    "pathlib._local.PosixPath",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
)
"""Classes of metrics, paths and settings in checkpoints. None of their code runs: `_Inert` stands in for them."""

_STAND_INS = [
    type(name.rpartition(".")[2], (_Inert,), {"__module__": name.rpartition(".")[0]}) for name in BESIDE_WEIGHTS
]


def read_pickled(path: Path) -> Any:
    """Read a file written by `torch.save`, in the current or the legacy format; tensors are memory-mapped if possible.

    Only tensors, plain containers and `argparse.Namespace` are accepted; `BESIDE_WEIGHTS` are left out.

    Raises:
        InputError: The file was not written by torch, is truncated, or needs anything else to be read.
    """
    if kind := _other_format(path):
        raise InputError(f"{path} is {kind}. Expected a file from torch.save: {{'model': state_dict}} or a state_dict.")
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *_STAND_INS]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError:
        raise
    except Exception as error:  # foreign bytes can make an unpickler raise anything
        wanted = re.search(r"Unsupported (?:global|class|operand).*?([\w.]+\.\w+)", str(error))
        if wanted:
            raise InputError(
                f"{path} was refused: reading it would run {wanted[1]}, which weights do not need. No code was run. "
                "If you trust its author, load it yourself and save {'model': model.state_dict()}."
            ) from None
        raise InputError(
            f"{path} is not a complete weight file: torch cannot read it. Expected a file from torch.save: "
            "{'model': state_dict} or a state_dict. Was the copy or download cut off?"
        ) from error


def _other_format(path: Path) -> str | None:
    """Return the kind of file, if it is one that `torch.load` does not read."""
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"\x08") and b"pytorch" in start:
        return "an ONNX model"
    if start.startswith(b"PK") and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                return "a TorchScript program"
    return None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without its full stop."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__
