"""The table of a store's objects that `search` and `explore` share, written once beside the store."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from detr_lightning.analysis.reader import ObjectReader
from detr_lightning.analysis.tables import SOURCE, describe, stream
from detr_lightning.errors import InputError, SettingError
from detr_lightning.store.export import output_path
from detr_lightning.store.store import EmbeddingStore

# Below tables, which reports a missing pyarrow.
from pyarrow import parquet  # isort: skip


def objects_table(
    store: EmbeddingStore,
    threshold: float = 0.7,
    annotation_file: str | os.PathLike[str] | None = None,
    path: str | os.PathLike[str] | None = None,
    *,
    outcomes: bool = True,
) -> Path:
    """Return the table of a store's objects, and write it if it is missing or was made with other settings.

    Args:
        store: The extraction.
        threshold: As for `objects`.
        annotation_file: As for `objects`.
        path: The table's file; by default the store's folder with the ending `.objects.parquet`. An existing
            file that is given is used as it is, if it belongs to this store.
        outcomes: Whether the outcomes are needed; if not, those of any annotations will do.

    Raises:
        InputError: The given file belongs to another extraction, or no object was found.
        FileExistsError: A file of the default name has other objects, and was not written by this function.
        SettingError: The store is not a folder, and no file is given; or the file may not be written there.
    """
    if path is not None and Path(path).expanduser().exists():
        path = Path(path).expanduser()
        recorded, expected = source_of(path), describe(store)
        for name in ("folder", "model_sha256"):
            if recorded.get(name) != expected[name]:
                raise InputError(
                    f"{path} belongs to another extraction: its {name} is {recorded.get(name)}, that of "
                    f"{store.name} is {expected[name]}. `detr-lightning objects` writes a table of this one."
                )
        return path
    if path is None:
        if store.folder is None:
            raise SettingError(f"{store.name} is not a folder. Name a file for its table of objects.")
        folder = store.folder.resolve()
        path = folder.with_name(f"{folder.name}.objects.parquet")
    path = output_path(store, path, ".parquet")
    reader = ObjectReader(store, threshold, annotation_file=annotation_file)
    if path.exists():
        recorded, expected = source_of(path), describe(store, reader)
        needed = [name for name in expected if outcomes or name not in ("annotations", "iou")]
        differing = [name for name in needed if recorded.get(name) != expected[name]]
        cached = recorded.get("cached", False)
        if not differing and (parquet.read_metadata(path).num_rows or not cached):
            return path
        if not cached:
            raise FileExistsError(
                f"{path} differs from the table that is needed here in: {', '.join(differing)}. Only a table that "
                "`search` or `explore` wrote is replaced. Rename this one; `search --table` uses it as it is."
            )
    if not stream(reader, path, cached=True).total():
        raise InputError(reader.nothing_found())
    return path


def source_of(path: Path) -> dict[str, Any]:
    """Return the origin of a table's objects, as `detr_lightning.analysis.tables.describe` recorded it.

    Raises:
        InputError: The file is not a Parquet file.
    """
    try:
        metadata = parquet.read_schema(path).metadata or {}
    except Exception as error:  # Arrow has several types of error for unreadable files.
        raise InputError(f"{path} is not a Parquet file ({error}). Remove it, or name another one.") from error
    content: dict[str, Any] = json.loads(metadata.get(SOURCE, b"{}"))
    return content
