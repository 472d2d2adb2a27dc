"""A folder of files turned into a table and back."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from object_store import Bucket
from store_factory import edit_metadata

from detr_lightning import EmbeddingStore
from detr_lightning.command.main import main
from detr_lightning.format.names import METADATA
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
    with pytest.raises(KeyError, match=r"'7\.jpg' is not an image id .* entry\(image_id\)\.file_name"):
        converted["7.jpg"]
    capsys.readouterr()


def test_skipped_images_stay_listed(store: EmbeddingStore, tmp_path: Path) -> None:
    skipped = [{"id": 99, "file_name": "broken.jpg", "reason": "empty file (0 bytes)"}]
    edit_metadata(Path(store.folder), failed=skipped, num_failed=1)
    table = convert(store.folder, tmp_path / "table")
    assert table.metadata["failed"] == skipped
    assert convert(tmp_path / "table", tmp_path / "back").metadata["failed"] == skipped


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "it lacks num_images, extract_type, embedding_keys"),
        ('{"layout": "lance", "num_images": 4, "extract_type": "decoder"}', "it lacks embedding_keys. Restore it"),
        ('{"num_images": 4, "extract_type": "decoder", "embedding_keys": [7]}', "embedding_keys is not a list"),
        ('{"num_images": 4, "extract_type": "decoder", "embedding_keys": []}', "does not belong to the table"),
    ],
)
def test_foreign_metadata_of_a_table(store: EmbeddingStore, tmp_path: Path, content: str, message: str) -> None:
    path = Path(convert(store.folder, tmp_path / "table").location, METADATA)
    path.write_text(content)
    with pytest.raises(ValueError, match=f"{path}.*{message}"):
        EmbeddingStore(tmp_path / "table")
    assert len(verify(tmp_path / "table")) == 1


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
    with pytest.raises(ValueError, match=path.name):
        convert(store.folder, tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("to_files", [False, True], ids=["to a table", "to files"])
def test_a_killed_conversion_starts_again(store: EmbeddingStore, tmp_path: Path, to_files: bool) -> None:
    source, target = store.folder, tmp_path / "target"
    if to_files:
        source = convert(store.folder, tmp_path / "table").folder
    killed = "import os; from detr_lightning.store import convert; calls = iter(range(99)); "
    killed += "convert.track = lambda images, *_: (image for image in images if next(calls) < 2 or os._exit(9)); "
    killed += "convert._BYTES_AT_ONCE = 1; convert.convert(*__import__('sys').argv[1:])"
    command = [sys.executable, "-W", "ignore", "-c", killed, str(source), str(target)]
    assert subprocess.run(command, check=False).returncode == 9
    assert len(list(target.rglob("*.*"))) > 1
    assert convert(source, target).image_ids == store.image_ids
    assert verify(target) == []


def test_a_killed_conversion_takes_nothing_of_others(store: EmbeddingStore, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "embedding_000000000027.pt").write_text("mine")
    with pytest.raises(FileExistsError):
        convert(store.folder, target)
    assert content_of(target) == {"embedding_000000000027.pt": b"mine"}


def test_a_failed_conversion_leaves_no_table_at_a_url(store: EmbeddingStore, bucket: Bucket) -> None:
    path = store.path(store.image_ids[-1])
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=path.name):
        convert(store.folder, f"{bucket.url}/table")
    path.write_bytes(whole)
    assert convert(store.folder, f"{bucket.url}/table").image_ids == store.image_ids


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


def test_a_file_that_was_changed_is_refused(store: EmbeddingStore, tmp_path: Path) -> None:
    """A table has no checksums: afterwards nobody could tell."""
    first, other = store.path(7), store.path(27)
    contents = first.read_bytes(), other.read_bytes()
    first.write_bytes(contents[1])
    other.write_bytes(contents[0])
    with pytest.raises(ValueError, match=r"embedding_000000000007\.pt is not the file that was written"):
        convert(store.folder, tmp_path / "table")
    assert not (tmp_path / "table").exists()


def test_a_target_in_the_source_is_refused(store: EmbeddingStore) -> None:
    before = content_of(store.folder)
    with pytest.raises(ValueError, match="which must contain nothing else"):
        convert(store.folder, store.folder / "table")
    assert content_of(store.folder) == before


def test_sigterm_ends_it_like_ctrl_c(
    store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def interrupted(images: Iterable[Any], *_: object) -> Iterator[Any]:
        yield next(iter(images))
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("detr_lightning.store.convert.track", interrupted)
    assert main(["convert", str(store.folder), str(tmp_path / "table")]) == 130
    assert capsys.readouterr().err == "Error: Interrupted.\n"
    assert not (tmp_path / "table").exists()
    assert signal.getsignal(signal.SIGTERM) == before


def test_edited_metadata_of_a_table_is_found(store: EmbeddingStore, tmp_path: Path, capsys: Capture) -> None:
    convert(store.folder, tmp_path / "table")
    assert main(["verify", str(tmp_path / "table")]) == 0
    assert "every row is complete and correct" in capsys.readouterr().out
    path = tmp_path / "table" / "metadata.json"
    path.write_text(path.read_text().replace('"random"', '"others"'))
    assert verify(tmp_path / "table") == [
        "metadata.json: was changed after it was written: its checksum does not match."
    ]
