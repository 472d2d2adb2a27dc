"""A folder of files turned into a table and back."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from store_factory import edit_metadata

from detr_lightning import EmbeddingStore
from detr_lightning.command.main import main
from detr_lightning.store.convert import convert
from detr_lightning.store.verify import verify

pytest.importorskip("lance", reason="pylance, of the extra lance, is not installed")

Capture = pytest.CaptureFixture[str]


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_both_ways_are_bit_for_bit(store: EmbeddingStore, tmp_path: Path, capsys: Capture) -> None:
    table, back = tmp_path / "table", tmp_path / "back"
    assert main(["convert", str(store.folder), str(table)]) == 0
    assert main(["convert", str(table), str(back)]) == 0
    assert content_of(back) == content_of(Path(store.folder))
    converted = EmbeddingStore(table)
    assert converted.is_table
    assert converted.image_ids == store.image_ids
    for image_id in store:
        assert list(converted[image_id]) == list(store[image_id])
        for key, tensor in converted[image_id].items():
            assert tensor.dtype == store[image_id][key].dtype
            assert torch.equal(tensor, store[image_id][key])
    assert verify(table) == verify(back) == []
    capsys.readouterr()


def test_skipped_images_stay_listed(store: EmbeddingStore, tmp_path: Path) -> None:
    skipped = [{"id": 99, "file_name": "broken.jpg", "reason": "empty file (0 bytes)"}]
    edit_metadata(Path(store.folder), failed=skipped, num_failed=1)
    table = convert(store.folder, tmp_path / "table")
    assert table.metadata["failed"] == skipped
    assert convert(tmp_path / "table", tmp_path / "back").metadata["failed"] == skipped


@pytest.mark.parametrize("existed", [False, True], ids=["new folder", "empty folder"])
def test_a_damaged_source_is_named_and_leaves_nothing(store: EmbeddingStore, tmp_path: Path, existed: bool) -> None:
    path = store.path(27)
    path.write_bytes(path.read_bytes()[:-100])
    target = tmp_path / "table"
    if existed:
        target.mkdir()
    with pytest.raises(ValueError, match=path.name):
        convert(store.folder, target)
    assert target.exists() == existed
    assert not existed or not list(target.iterdir())


def test_where_it_may_go(store: EmbeddingStore, tmp_path: Path) -> None:
    used = tmp_path / "used"
    used.mkdir()
    (used / "notes.txt").write_text("mine")
    for target in (used, used / "notes.txt"):
        with pytest.raises(FileExistsError, match=r"is a file or not empty\. Name a folder that is empty"):
            convert(store.folder, target)
    assert content_of(used) == {"notes.txt": b"mine"}
    table = convert(store.folder, tmp_path / "table")
    with pytest.raises(ValueError, match="is a URL, but one file per image needs a folder"):
        convert(os.fspath(table.folder), "s3://bucket/files")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        convert(tmp_path / "nowhere", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_folder_that_cannot_be_made_says_why(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object, **_settings: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(OSError, match="No space left on device"):
        convert(store.folder, tmp_path / "table")
