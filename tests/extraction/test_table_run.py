"""One Lance table through the command: the same tensors as files, resuming, refusals, an object store."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from coco_factory import Coco, make_coco
from object_store import Bucket
from ran import RunCLI

lance = pytest.importorskip("lance", reason="pylance, of the extra lance, is not installed")

from detr_lightning import EmbeddingStore  # noqa: E402
from detr_lightning.extraction.table_locations import FolderLocation  # noqa: E402
from detr_lightning.extractor import DETRExtractor  # noqa: E402
from detr_lightning.format import object_store as store_access  # noqa: E402
from detr_lightning.format.table import Table  # noqa: E402
from detr_lightning.store.verify import verify  # noqa: E402

TO_TABLE = ("--writer.layout", "lance")
ALL = ("--extract_type", "all")


def assert_equal(one: EmbeddingStore, other: EmbeddingStore) -> None:
    assert one.image_ids == other.image_ids
    for image_id in one:
        ours, theirs = one[image_id], other[image_id]
        assert list(ours) == list(theirs)
        for key, tensor in ours.items():
            assert tensor.dtype == theirs[key].dtype
            assert torch.equal(tensor, theirs[key]), (image_id, key)
        assert one.entry(image_id).features == other.entry(image_id).features


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Coco:
    return make_coco(tmp_path_factory.mktemp("images"), 8)


@pytest.fixture
def files(run_cli: RunCLI, images: Coco, tmp_path: Path) -> EmbeddingStore:
    assert run_cli("predict", *images.data, *ALL, "--output_dir", tmp_path / "files").code == 0
    return EmbeddingStore(tmp_path / "files")


def test_a_table_has_the_tensors_of_the_files(
    run_cli: RunCLI, images: Coco, files: EmbeddingStore, tmp_path: Path
) -> None:
    folder = tmp_path / "table"
    ran = run_cli("predict", *images.data, *ALL, *TO_TABLE, "--output_dir", folder)
    assert ran.code == 0, ran.err
    assert sorted(path.name for path in folder.iterdir()) == ["embeddings.lance", "metadata.json"]
    table = EmbeddingStore(folder)
    assert_equal(table, files)
    assert verify(folder) == []
    metadata = json.loads((folder / "metadata.json").read_text())
    assert metadata["layout"] == "lance"
    assert metadata["num_images"] == 8
    assert not {"image_ids", "images"} & metadata.keys()
    ids, stacked = table.stack("query_embeddings", [22, 1, 7])
    assert ids == [22, 1, 7]
    assert torch.equal(stacked, files.stack("query_embeddings", [22, 1, 7])[1])
    assert torch.equal(table.feature_map(4), files.feature_map(4))
    again = run_cli("predict", *images.data, *ALL, *TO_TABLE, "--output_dir", folder)
    assert (again.code, "Nothing to do" in again.err) == (0, True)

    dataset = lance.dataset(str(folder / "embeddings.lance"))
    assert len(dataset.versions()) == 1
    assert [index.field_names for index in dataset.describe_indices()] == [["image_id"]]


def test_kept_queries(run_cli: RunCLI, images: Coco, tmp_path: Path) -> None:
    four = ("predict", *images.data, "--data.limit", "4")
    assert run_cli(*four, "--output_dir", tmp_path / "full").code == 0
    scores = EmbeddingStore(tmp_path / "full").stack("pred_logits")[1].softmax(-1)[..., :-1].amax(-1)  # [4, 10]
    kept = ("--writer.min_score", str(scores.median().item()))
    assert run_cli(*four, *kept, "--output_dir", tmp_path / "files").code == 0
    assert run_cli(*four, *kept, *TO_TABLE, "--output_dir", tmp_path / "table").code == 0
    files, table = EmbeddingStore(tmp_path / "files"), EmbeddingStore(tmp_path / "table")
    assert_equal(table, files)
    assert len({table.entry(image_id).num_queries for image_id in table}) > 1
    for ours, theirs in zip(table.rows("query_embeddings"), files.rows("query_embeddings"), strict=True):
        assert torch.equal(ours, theirs)
    assert verify(tmp_path / "table") == []


def test_what_was_committed_before_a_crash_is_not_computed_again(
    run_cli: RunCLI, images: Coco, files: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "table"
    command = ("predict", *images.data, *ALL, *TO_TABLE, "--output_dir", folder, "--data.batch_size", "1")
    step, seen = DETRExtractor.predict_step, []

    def crash(self: DETRExtractor, batch: dict, *args: int) -> dict:
        if len(seen) == 5:
            raise RuntimeError("the power is out")
        seen.extend(batch["image_id"])
        return step(self, batch, *args)

    monkeypatch.setattr(DETRExtractor, "predict_step", crash)
    with pytest.raises(RuntimeError, match="the power is out"):
        run_cli(*command, "--writer.commit_seconds", "1e-9", "--writer.threads", "1")
    monkeypatch.undo()
    kept = [entry.image_id for entry, _ in Table(folder).entries()]
    assert kept
    assert not (folder / "metadata.json").exists()
    with pytest.raises(FileNotFoundError, match="unfinished"):
        EmbeddingStore(folder)
    partial = EmbeddingStore(folder, partial=True)
    assert partial.image_ids == sorted(kept)
    assert (partial.is_partial, partial.num_planned) == (True, 8)
    assert f"{len(kept)} of 8 images, unfinished" in repr(partial)
    assert f"{len(kept)} of 8 images, unfinished" in run_cli("summary", folder).out
    for image_id in partial:
        for key, tensor in partial[image_id].items():
            assert torch.equal(tensor, files[image_id][key])

    computed: list[int] = []
    monkeypatch.setattr(
        DETRExtractor,
        "predict_step",
        lambda self, batch, *a: (computed.extend(batch["image_id"]), step(self, batch, *a))[1],
    )
    assert run_cli(*command).code == 0
    assert sorted(computed + kept) == files.image_ids
    assert_equal(EmbeddingStore(folder), files)


def test_rows_that_an_image_has_too_many_are_removed(run_cli: RunCLI, images: Coco, tmp_path: Path) -> None:
    folder = tmp_path / "table"
    command = ("predict", *images.data, *TO_TABLE, "--output_dir", folder)
    assert run_cli(*command).code == 0
    dataset = lance.dataset(str(folder / "embeddings.lance"))
    dataset.insert(
        dataset.to_table().slice(2, 3)
    )  # as a commit does that landed, was not acknowledged, and was tried again
    (folder / "metadata.json").unlink()
    assert run_cli(*command).code == 0
    assert lance.dataset(str(folder / "embeddings.lance")).count_rows() == 8
    assert verify(folder) == []


def test_an_image_that_cannot_be_read_is_a_row_with_its_reason(run_cli: RunCLI, images: Coco, tmp_path: Path) -> None:
    copy = Coco(tmp_path / "images", images.annotations)
    shutil.copytree(images.images, copy.images)
    (copy.images / "000000000007.jpg").write_bytes(b"")
    command = ("predict", *copy.data, *TO_TABLE, "--output_dir", tmp_path / "table", "--data.on_error", "skip")
    assert run_cli(*command).code == 0
    (row,) = (
        lance.dataset(str(tmp_path / "table" / "embeddings.lance")).to_table(filter="error IS NOT NULL").to_pylist()
    )
    assert (row["image_id"], row["error"], row["query_embeddings"]) == (7, "empty file (0 bytes)", None)
    store = EmbeddingStore(tmp_path / "table")
    assert 7 not in store
    assert len(store) == 7
    shutil.copy(images.images / "000000000007.jpg", copy.images)
    assert run_cli(*command).code == 0
    assert len(EmbeddingStore(tmp_path / "table")) == 8


def test_other_settings_layouts_and_tables_are_refused(run_cli: RunCLI, images: Coco, tmp_path: Path) -> None:
    table, files = tmp_path / "table", tmp_path / "files"
    assert run_cli("predict", *images.data, *TO_TABLE, "--output_dir", table).code == 0
    assert run_cli("predict", *images.data, "--output_dir", files).code == 0
    foreign = tmp_path / "foreign"
    lance.write_dataset(
        lance.dataset(str(table / "embeddings.lance")).to_table(columns=["file_name"]),
        str(foreign / "embeddings.lance"),
    )
    for message, arguments in {
        "writer.dtype was float32, now float16": (*TO_TABLE, "--output_dir", table, "--writer.dtype", "float16"),
        "contains one table, not one file per image": ("--output_dir", table),
        "one file per image, not a table": (*TO_TABLE, "--output_dir", files),
        "another program's Lance dataset": (*TO_TABLE, "--output_dir", foreign),
        "writer.layout=files needs a folder": ("--output_dir", "s3://bucket/out"),
        "is not empty": (*TO_TABLE, "--output_dir", table, "--writer.if_exists", "error"),
    }.items():
        ran = run_cli("predict", *images.data, *arguments)
        assert ran.code == 1, message
        assert message in ran.err
    ran = run_cli(
        "predict",
        *images.data,
        *TO_TABLE,
        "--output_dir",
        table,
        "--writer.dtype",
        "float16",
        "--writer.if_exists",
        "overwrite",
    )
    assert ran.code == 0, ran.err
    assert EmbeddingStore(table).load(1, "query_embeddings").dtype is torch.float16


def test_an_object_store(run_cli: RunCLI, images: Coco, files: EmbeddingStore, bucket: Bucket, tmp_path: Path) -> None:
    url = f"{bucket.url}/out"
    command = ("predict", *images.data, *ALL, *TO_TABLE, "--output_dir", url)
    assert run_cli(*command, "--data.limit", "5").code == 0
    ran = run_cli(*command)
    assert ran.code == 0, ran.err
    store = EmbeddingStore(url)
    assert_equal(store, files)
    assert verify(url) == []
    assert run_cli("summary", url).code == 0
    assert run_cli("export", url, "--output", tmp_path / "queries.npy").code == 0
    loader = torch.utils.data.DataLoader(store.dataset("pred_boxes"), num_workers=1, multiprocessing_context="spawn")
    assert [int(image_id) for _boxes, image_id in loader] == files.image_ids
    missing = run_cli("verify", "s3://nowhere/out")
    assert missing.code == 1
    assert "s3://nowhere/out" in missing.err


def test_a_table_that_another_run_makes_meanwhile_is_joined(
    run_cli: RunCLI, images: Coco, files: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("predict", *images.data, *ALL, *TO_TABLE, "--output_dir", tmp_path / "out")
    assert run_cli(*command, "--data.limit", "3").code == 0
    exists, create, tried = store_access.exists, Table.create, []
    # Until this run makes the table there is none; then the other run's is there.
    monkeypatch.setattr(store_access, "exists", lambda place: bool(tried) and exists(place))
    monkeypatch.setattr(Table, "create", lambda *arguments: (tried.append(True), create(*arguments))[1])
    monkeypatch.setattr(FolderLocation, "refuse_files", lambda self: None)
    ran = run_cli(*command)
    assert ran.code == 0, ran.err
    assert_equal(EmbeddingStore(tmp_path / "out"), files)
    assert tried


def test_a_resume_reads_the_entries_once(
    run_cli: RunCLI, images: Coco, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A million of them take half a minute."""
    command = ("predict", *images.data, *TO_TABLE, "--output_dir", tmp_path / "table")
    assert run_cli(*command).code == 0
    read: list[Table] = []
    entries = Table.entries
    monkeypatch.setattr(Table, "entries", lambda self, **given: (read.append(self), entries(self, **given))[1])
    ran = run_cli(*command)
    assert ran.code == 0
    assert "8 images. Nothing to do." in ran.err
    assert len(read) == 1


def test_an_overwrite_that_dies_leaves_no_finished_extraction(
    run_cli: RunCLI, images: Coco, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its rows the table is unfinished, whatever the metadata said before."""
    command = ("predict", *images.data, *TO_TABLE, "--output_dir", tmp_path)
    assert run_cli(*command).code == 0

    def empty(table: Table, schema: Any) -> None:
        original(table, schema)
        raise OSError("killed")

    original = Table.empty
    with monkeypatch.context() as patch:
        patch.setattr(Table, "empty", empty)
        assert run_cli(*command, "--writer.if_exists", "overwrite").code == 1
    with pytest.raises(FileNotFoundError, match="unfinished"):
        EmbeddingStore(tmp_path)
    assert run_cli(*command).code == 0
    assert len(EmbeddingStore(tmp_path)) == 8


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("--extract_type", "encoder"), ("--extract_type", "decoder")),
        (("--extract_type", "all"), ("--extract_type", "encoder")),
        (("--writer.dtype", "float16"), ("--writer.dtype", "float32")),
        (("--writer.dtype", "float32"), ("--writer.min_score", "0.1")),
        (("--data.short_side", "48"), ("--data.short_side", "64")),
    ],
)
def test_a_table_without_images_takes_other_settings(
    run_cli: RunCLI,
    images: Coco,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    first: tuple[str, ...],
    second: tuple[str, ...],
) -> None:
    """A run that dies early leaves a table with its own columns; the next one does not write into those."""

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    command = ("predict", *images.data, "--data.long_side", "128")
    with monkeypatch.context() as patch:
        patch.setattr("detr_lightning.extraction.row_writer.RowWriter.add", full)
        assert run_cli(*command, *TO_TABLE, *first, "--output_dir", tmp_path / "table").code == 1
    for folder, layout in (("table", "lance"), ("files", "files")):
        ran = run_cli(*command, "--writer.layout", layout, *second, "--output_dir", tmp_path / folder)
        assert ran.code == 0, ran.err
    assert_equal(EmbeddingStore(tmp_path / "table"), EmbeddingStore(tmp_path / "files"))
    ran = run_cli(*command, *TO_TABLE, *second, "--output_dir", tmp_path / "table")
    assert "Nothing to do" in ran.err


def test_a_table_at_a_url_is_not_taken_from_a_run_with_other_settings(
    run_cli: RunCLI, images: Coco, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    command = ("predict", *images.data, *TO_TABLE, "--output_dir", f"{bucket.url}/out")
    with monkeypatch.context() as patch:
        patch.setattr("detr_lightning.extraction.row_writer.RowWriter.add", full)
        assert run_cli(*command).code == 1
    store_access.write_file(f"{bucket.url}/out", "metadata.json", b"{}")
    ran = run_cli(*command, "--writer.dtype", "float16")
    assert ran.code == 1
    assert "was begun with other settings" in ran.err
    assert store_access.read_file(f"{bucket.url}/out", "metadata.json") == b"{}"  # A refused run changes nothing.
    assert "writer.dtype was float32, now float16" in ran.err
    assert run_cli(*command, "--writer.dtype", "float16", "--writer.if_exists", "overwrite").code == 0
    assert EmbeddingStore(f"{bucket.url}/out")[1]["decoder_output"].dtype is torch.float16


def test_a_name_that_is_not_utf_8_is_refused_before_the_first_image(
    run_cli: RunCLI, images: Coco, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    shutil.copy(next(images.images.iterdir()), os.fsencode(folder) + b"/caf\xe9.jpg")
    command = ("predict", "--data.image_dir", folder, *TO_TABLE, "--output_dir", tmp_path / "out")
    ran = run_cli(*command)
    assert ran.code == 1
    assert "is not valid UTF-8" in ran.err
    assert not (tmp_path / "out").exists()
