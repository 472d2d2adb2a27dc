"""Converting a folder of files into a Lance table, or a table into a folder of files."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from detr_lightning.errors import InputError, SettingError
from detr_lightning.format.entries import ImageEntry
from detr_lightning.format.files import checksum_of, fsync_folder, save_tensors, to_json_bytes, write_json
from detr_lightning.format.keys import FeatureSizes
from detr_lightning.format.names import METADATA, TABLE, TEMPORARY, image_id_of, is_url
from detr_lightning.format.schema import LANCE, Metadata
from detr_lightning.parallel import track
from detr_lightning.store.export import check_outside
from detr_lightning.store.store import EmbeddingStore

_BYTES_AT_ONCE = 64 * 2**20

_UNFINISHED = ".conversion"
"""The file that marks a folder whose conversion has not finished: all else in it is the conversion's."""


def convert(
    source: str | os.PathLike[str], target: str | os.PathLike[str], progress: bool | None = None
) -> EmbeddingStore:
    """Write an extraction in the other layout: files as a table, a table as files, bit for bit the same tensors.

    Args:
        source: A finished extraction.
        target: A folder that is empty or does not exist yet; for a table also a URL. A failed conversion leaves the
            folder as it was; one that was killed is started again by the same call.
        progress: Show a progress bar; by default for more than 1000 images or after two seconds.

    Returns:
        The extraction in its new layout.

    Raises:
        FileExistsError: The target is a file, or is not empty.
        FileNotFoundError: There is no finished extraction at the source.
        InputError: The metadata or a file of the source is damaged.
        MissingPackageError: Lance is not installed.
        OSError: The target cannot be written.
        SettingError: The source is a table, and the target is a URL; or the target lies in the source.
    """
    store = EmbeddingStore(source)
    to_files = store.is_table
    target = os.fspath(target)
    if to_files and is_url(target):
        raise SettingError(f"{target} is a URL, but one file per image needs a folder. Name a folder to convert into.")
    folder = None if is_url(target) else Path(target).expanduser()
    if folder is not None:
        check_outside(store, folder)
    images = track(_images(store), len(store), "Converting", progress)
    with contextlib.nullcontext() if folder is None else _claimed(folder):
        if to_files:
            assert folder is not None
            _write_files(store, folder, images)
        else:
            _write_table(store, target if folder is None else str(folder), images)
    return EmbeddingStore(target)


@contextlib.contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """Mark a folder as ours until it is converted into. What an error leaves behind is removed.

    Raises:
        FileExistsError: It is a file, or contains something that no conversion wrote.
        OSError: It cannot be created.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    mark = folder / _UNFINISHED
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not mark.exists())):
        raise FileExistsError(f"{folder} is a file or not empty. Name a folder that is empty or does not exist yet.")
    folder.mkdir(parents=True, exist_ok=True)
    mark.touch()
    try:
        _clear(folder)
        yield
        mark.unlink()
    except BaseException:
        _clear(folder)
        mark.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # A folder is not empty: somebody else is using it.
            for path in made:
                path.rmdir()
        raise


def _clear(folder: Path) -> None:
    """Remove what a conversion wrote."""
    for path in folder.iterdir():
        if path.name == TABLE:
            shutil.rmtree(path)
        elif path.name == METADATA or image_id_of(path.name) is not None or path.match(TEMPORARY):
            path.unlink()


def _images(store: EmbeddingStore) -> Iterator[tuple[ImageEntry, dict[str, Tensor]]]:
    """Yield the entry and the tensors of each image.

    Raises:
        InputError: A file is not the one that was written.
    """
    for image_id in store:
        entry = store.entry(image_id)
        if entry.checksum is not None and not store.is_table:
            path = store.path(image_id)
            if checksum_of(path.read_bytes()) != entry.checksum:
                raise InputError(
                    f"{path} is not the file that was written: its checksum differs from that in {METADATA}. "
                    "Delete it, and run the extraction again to restore it."
                )
        yield entry, store[image_id]


def _write_files(store: EmbeddingStore, folder: Path, images: Iterator[tuple[ImageEntry, dict[str, Tensor]]]) -> None:
    entries = []
    for entry, tensors in images:
        saved = save_tensors(folder, entry.image_id, tensors)
        entries.append(replace(entry, bytes=saved.bytes, checksum=saved.checksum))
    fsync_folder(folder)
    metadata = Metadata(run=store.metadata_file.run, images=entries, failed=store.metadata_file.failed())
    write_json(folder / METADATA, metadata.to_json(), checksum=True)
    fsync_folder(folder)


def _write_table(store: EmbeddingStore, target: str, images: Iterator[tuple[ImageEntry, dict[str, Tensor]]]) -> None:
    from detr_lightning.format import columns, object_store, table  # need Lance

    if object_store.exists(target):
        raise FileExistsError(f"{target} already has a table. Name another target.")
    run, failed = store.metadata_file.run, store.metadata_file.failed()
    features = next((store.entry(image_id).features for image_id in store), None) or FeatureSizes.single((1, 1))
    schema = columns.table_schema(run, features)
    fragments: list[object] = []
    entries: list[ImageEntry] = []
    rows: list[columns.Row] = [(skipped, {}) for skipped in failed]
    size = 0
    for entry, tensors in images:
        entries.append(entry)
        rows.append((entry, tensors))
        size += sum(tensor.nbytes for tensor in tensors.values())
        if size >= _BYTES_AT_ONCE:
            fragments += table.write_rows(target, schema, rows)
            rows, size = [], 0
    if rows:
        fragments += table.write_rows(target, schema, rows)
    made = table.Table.create(target, schema)  # Last, so that a conversion that fails leaves no table at a URL.
    made.append(fragments)
    made.optimise(_BYTES_AT_ONCE)
    made.remove_old_versions()
    content = Metadata(run=run, images=entries, failed=failed, layout=LANCE).to_json()
    if is_url(target):
        object_store.write_file(target, METADATA, to_json_bytes(content, checksum=True))
    else:
        write_json(Path(target, METADATA), content, checksum=True)
