"""Lance on a disk or an object store: the address of the table, small files beside it, and helpful errors."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from detr_lightning.errors import InputError, MissingPackageError
from detr_lightning.format.names import TABLE, is_url

# Lance reads this when it is first imported. Otherwise it reports on stderr that a new dataset is new.
os.environ.setdefault("LANCE_LOG", "error")

try:
    import lance
    import pyarrow as pa
    from lance.file import LanceFileSession
except ImportError as missing:
    raise MissingPackageError("writer.layout=lance needs Lance: pip install 'detr-lightning[lance]'.") from missing

IMPORTED_BY = os.getpid()
"""The process that imported Lance, which has threads from then on: it does not survive a fork."""

__all__ = ["IMPORTED_BY", "exists", "explained", "lance", "pa", "read_file", "remove_file", "table_uri", "write_file"]


def table_uri(output_dir: str | os.PathLike[str]) -> str:
    """Return the path or URL of the dataset in an output folder."""
    return f"{os.fspath(output_dir).rstrip('/')}/{TABLE}"


def exists(output_dir: str | os.PathLike[str]) -> bool:
    """Return whether an output folder has a table.

    Raises:
        OSError: The object store does not respond, or denies access.
    """
    with explained(os.fspath(output_dir)):
        return bool(LanceFileSession(table_uri(output_dir)).list("_versions"))


def read_file(output_dir: str, name: str) -> bytes | None:
    """Return the content of a small file on an object store, or None if it does not exist.

    Raises:
        OSError: The object store does not respond, or denies access.
    """
    with explained(output_dir), tempfile.TemporaryDirectory() as folder:
        session, copy = LanceFileSession(output_dir.rstrip("/")), Path(folder, "copy")
        if not session.contains(name):
            return None
        session.download_file(name, copy)
        return copy.read_bytes()


def write_file(output_dir: str, name: str, content: bytes) -> None:
    """Write a small file to an object store, whole or not at all.

    Raises:
        OSError: The object store does not respond, or denies access.
    """
    with explained(output_dir), tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        copy.write_bytes(content)
        LanceFileSession(output_dir.rstrip("/")).upload_file(copy, name)


def remove_file(output_dir: str, name: str) -> None:
    """Remove a file from an object store.

    Raises:
        OSError: The object store does not respond, or denies access.
    """
    with explained(output_dir):
        LanceFileSession(output_dir.rstrip("/")).delete_file(name)


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turn Lance's errors into one that names the table and gives advice.

    Raises:
        OSError: Lance raised an error for a disk or an object store.
    """
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, InputError | FileNotFoundError):
            raise
        # Lance ends its messages with the source file that raised them.
        reason = next(iter(str(error).partition(", /home")[0].strip().splitlines()), type(error).__name__)
        problem = _remote_problem(reason) if is_url(uri) else f"{reason}. {_local_advice(reason)}"
        raise OSError(f"{uri}: {problem}") from error


def _remote_problem(reason: str) -> str:
    """Describe an object store's problem, with advice."""
    if "AWS credentials" in reason:
        return (
            "no credentials were found. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment and, for a "
            "server that is not Amazon's, AWS_ENDPOINT."
        )
    if "403 Forbidden" in reason or "AccessDenied" in reason:
        return (
            "the server denies access (403 Forbidden). Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and whether "
            "they grant permission to read, write and list there."
        )
    return f"{reason}. {_remote_advice(reason)}"


def _remote_advice(reason: str) -> str:
    if "Not Implemented" in reason or "NotImplemented" in reason:
        return "A table needs conditional writes (PUT with If-None-Match), which this object store does not have."
    if "concurrent transaction" in reason:
        return "Another command is writing to this table. Run the same command again when it has ended."
    return "Check the address and the credentials in the environment."


def _local_advice(reason: str) -> str:
    if "No space left" in reason or "os error 28" in reason:
        return "Free some space, then run the same command again: committed rows are kept."
    return "Check the disk, then run the same command again: committed rows are kept."
