"""What a second run makes of the folder that a first one left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from coco_factory import SMALL, Coco, make_coco
from disk import extract
from harness import Job, Zygote, contents, differences, message, slow, until
from PIL import Image

from detr_lightning.data import loading
from detr_lightning.errors import BusyError
from detr_lightning.extraction.journal import Journal
from detr_lightning.extraction.locks import lock_folder
from detr_lightning.format.entries import ImageEntry

Run = Callable[..., Any]


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="session")
def finished(zygote: Zygote, coco_folder: Coco, tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "out"
    run = zygote.start("predict", "--model.weights", tiny_weights, *coco_folder.data, "--output_dir", folder)
    assert run.wait() == 0, run.err
    return folder


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    """Leave a finished run."""
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


def test_a_finished_run_returns_at_once(
    run_cli: Run, coco_folder: Coco, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(out)
    monkeypatch.setattr(loading, "read_image", None)
    ran = run_cli("predict", *coco_folder.data, "--output_dir", out)
    assert ran.code == 0
    assert "Nothing to do" in ran.err
    assert snapshot(out) == before


@pytest.mark.parametrize(
    ("args", "difference"),
    [
        (("--writer.dtype", "float16"), "writer.dtype was float32, now float16"),
        (("--extract_type", "encoder"), "keys was"),
        (("--data.short_side", "60"), "data.short_side was 64, now 60"),
        (("--data.batching", "padded", "--data.batch_size", "8"), "data.batching was exact, now padded, 8"),
        (
            ("--trainer.precision", "bf16-mixed", "--allow_slow_precision"),
            "trainer.precision was 32-true, now bf16-mixed",
        ),
        (("--data.image_backend", "torchvision"), "data.image_backend was pil, now torchvision"),
    ],
)
def test_other_settings_refuse_and_name_the_difference(
    run_cli: Run, coco_folder: Coco, out: Path, args: tuple[str, ...], difference: str
) -> None:
    before = snapshot(out)
    ran = run_cli("predict", *coco_folder.data, "--output_dir", out, *args)
    assert ran.code == 1
    text = message(ran.err)
    assert difference in text
    assert "writer.if_exists=overwrite" in text
    assert "another output_dir" in text
    assert snapshot(out) == before


def test_other_weights_refuse(run_cli: Run, coco_folder: Coco, out: Path, tiny_weights: Path, tmp_path: Path) -> None:
    content = torch.load(tiny_weights)
    content["model"]["query_embed.weight"][0, 0] += 1
    torch.save(content, tmp_path / "other.pth")
    other = ("--model.weights", tmp_path / "other.pth")
    ran = run_cli("predict", *coco_folder.data, "--output_dir", out, *other)
    assert ran.code == 1
    assert "weights (sha256) was" in message(ran.err)


def test_a_known_id_with_another_file_refuses(run_cli: Run, coco_folder: Coco, out: Path, tmp_path: Path) -> None:
    content = json.loads(coco_folder.annotations.read_text())
    content["images"][0]["file_name"] = content["images"][2]["file_name"]
    (tmp_path / "other.json").write_text(json.dumps(content))
    before = snapshot(out)
    ran = run_cli("predict", *Coco(coco_folder.images, tmp_path / "other.json").data, "--output_dir", out)
    assert ran.code == 1
    assert "was extracted with file_name" in message(ran.err)
    assert snapshot(out) == before


def test_more_images_are_added_and_fewer_remove_nothing(run_cli: Run, coco_folder: Coco, tmp_path: Path) -> None:
    command = ("predict", *coco_folder.data, "--output_dir", tmp_path / "out")
    assert run_cli(*command, "--data.limit", "3").code == 0
    before = snapshot(tmp_path / "out")
    assert run_cli(*command).code == 0
    after = snapshot(tmp_path / "out")
    assert len(contents(tmp_path / "out")) == 8
    assert all(after[name] == before[name] for name in before if name != "metadata.json")
    ran = run_cli(*command, "--data.limit", "2")
    assert "Nothing to do" in ran.err
    assert snapshot(tmp_path / "out") == after


@pytest.mark.parametrize("damage", ["truncated", "foreign", "missing", "empty"])
def test_what_is_not_whole_is_redone(run_cli: Run, coco_folder: Coco, out: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(out, tmp_path / "whole")
    victim = sorted(out.glob("*.pt"))[2]
    others = {path: path.stat().st_mtime_ns for path in out.glob("*.pt") if path != victim}
    content = victim.read_bytes()
    if damage == "missing":
        victim.unlink()
    else:
        changed = {"truncated": content[:-100], "foreign": b"x" * len(content), "empty": b""}
        victim.write_bytes(changed[damage])
    ran = run_cli("predict", *coco_folder.data, "--output_dir", out)
    assert ran.code == 0
    assert "1 image to" in ran.err
    assert "7 more are finished" in ran.err
    assert {path: path.stat().st_mtime_ns for path in others} == others
    assert differences(out, tmp_path / "whole", 1e-5) == []


def test_a_file_that_no_run_recorded_is_redone(run_cli: Run, coco_folder: Coco, out: Path, tmp_path: Path) -> None:
    shutil.copytree(out, tmp_path / "whole")
    (out / "metadata.json").unlink()
    ran = run_cli("predict", *coco_folder.data, "--output_dir", out)
    assert ran.code == 0
    assert "8 images to" in ran.err
    assert differences(out, tmp_path / "whole") == []


def test_overwrite_removes_only_what_this_program_wrote(run_cli: Run, coco_folder: Coco, out: Path) -> None:
    mine = [out / "notes.txt", out / "embedding_000000000999.pt", out / "sub" / "metadata.json"]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    ran = run_cli(
        *("predict", *coco_folder.data, "--output_dir", out, "--data.limit", "2"),
        *("--writer.if_exists", "overwrite", "--writer.dtype", "float16"),
    )
    assert ran.code == 0, ran.err
    assert all(path.read_text() == "mine" for path in mine)
    left = {path.name for path in out.iterdir()} - {"notes.txt", "sub", "embedding_000000000999.pt"}
    assert left == {"metadata.json", "embedding_000000000001.pt", "embedding_000000000004.pt"}
    assert json.loads((out / "metadata.json").read_text())["dtype"] == "float16"


@pytest.mark.parametrize("content", ["{}", "{", '{"image_ids": [1], "num_images": 1, "extract_type": "decoder"}', "[]"])
@pytest.mark.parametrize("if_exists", ["resume", "overwrite"])
def test_another_programs_metadata_is_left_alone(
    run_cli: Run, coco_folder: Coco, tmp_path: Path, content: str, if_exists: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "metadata.json").write_text(content)
    before = snapshot(out)
    ran = run_cli("predict", *coco_folder.data, "--output_dir", out, "--writer.if_exists", if_exists)
    assert ran.code == 1
    assert str(out / "metadata.json") in message(ran.err)
    assert snapshot(out) == before


@pytest.mark.parametrize("lost", ["model", "preprocessing", "images"])
def test_metadata_that_lacks_something(run_cli: Run, coco_folder: Coco, out: Path, lost: str) -> None:
    path = out / "metadata.json"
    metadata = json.loads(path.read_text())
    if lost == "images":
        del metadata["images"][0]["feature_size"]
    else:
        del metadata[lost]
    path.write_text(json.dumps(metadata))
    ran = run_cli("predict", *coco_folder.data, "--output_dir", out)
    if lost == "images":
        assert ran.code == 0
        assert "1 image to" in ran.err
        assert len(contents(out)) == 8
    else:
        assert ran.code == 1
        assert "does not record the settings" in message(ran.err)


def test_if_exists_error(run_cli: Run, coco_folder: Coco, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("predict", *coco_folder.data, "--output_dir", out, "--writer.if_exists", "error")
    out.mkdir()
    assert run_cli(*command).code == 0  # empty
    before = snapshot(out)
    ran = run_cli(*command)
    assert ran.code == 1
    assert "is not empty" in message(ran.err)
    assert snapshot(out) == before


def test_a_file_as_output_folder(run_cli: Run, coco_folder: Coco, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        ran = run_cli("predict", *coco_folder.data, "--output_dir", folder)
        assert ran.code == 1
        assert str(folder) in message(ran.err)


def test_ids_of_a_folder_stay_when_images_come_and_go(run_cli: Run, coco_folder: Coco, tmp_path: Path) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    source = sorted(coco_folder.images.iterdir())
    for name, path in zip(("b.jpg", "d.jpg", "f.jpg"), source, strict=False):
        shutil.copy(path, images / name)
    command = ("predict", "--data.image_dir", images, *SMALL, "--output_dir", out)
    assert run_cli(*command).code == 0
    shutil.copy(source[3], images / "a.jpg")
    (images / "d.jpg").unlink()
    assert run_cli(*command).code == 0
    names = {entry["id"]: entry["file_name"] for entry in json.loads((out / "metadata.json").read_text())["images"]}
    assert names == {1: "b.jpg", 2: "d.jpg", 3: "f.jpg", 4: "a.jpg"}
    contents(out)


@pytest.mark.parametrize("annotated", [False, True])
def test_another_size_of_an_image_is_noticed(run_cli: Run, tmp_path: Path, annotated: bool) -> None:
    coco, out = make_coco(tmp_path, 3), tmp_path / "out"
    source = (*coco.data, "--data.exif", "apply") if annotated else ("--data.image_dir", coco.images, *SMALL)
    command = ("predict", *source, "--output_dir", out)
    assert run_cli(*command).code == 0
    Image.new("RGB", (90, 70)).save(coco.images / "000000000004.jpg")
    before = snapshot(out)
    ran = run_cli(*command)
    assert ran.code == 1
    assert "image 4" in message(ran.err)
    assert "was extracted with width 64, but now has 90" in message(ran.err)
    assert snapshot(out) == before
    (out / "embedding_000000000004.pt").unlink()
    assert run_cli(*command).code == 0
    sizes = [(entry["width"], entry["height"]) for entry in json.loads((out / "metadata.json").read_text())["images"]]
    assert sizes == [(96, 64), (90, 70), (64, 64)]


def test_without_finished_images_sizes_follow_the_settings(run_cli: Run, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "images").mkdir()
    Image.new("RGB", (96, 64)).save(tmp_path / "images" / "1.jpg", exif=exif)
    out = tmp_path / "out"
    command = ("predict", "--data.image_dir", tmp_path / "images", *SMALL, "--output_dir", out)
    assert run_cli(*command).code == 0
    (out / "embedding_000000000001.pt").unlink()
    assert run_cli(*command, "--data.exif", "apply").code == 0
    (entry,) = json.loads((out / "metadata.json").read_text())["images"]
    assert (entry["width"], entry["height"]) == (64, 96)


def test_dry_run_touches_nothing(run_cli: Run, coco_folder: Coco, tmp_path: Path) -> None:
    ran = run_cli("predict", *coco_folder.data, "--output_dir", tmp_path / "out", "--dry_run")
    assert ran.code == 0
    assert not (tmp_path / "out").exists()


def test_leftovers_are_swept_and_torn_lines_ignored(tmp_path: Path) -> None:
    extract(tmp_path, [1, 2, 3])
    metadata = json.loads((tmp_path / "metadata.json").read_text())
    (tmp_path / "metadata.json").unlink()
    state = tmp_path / ".extraction"
    state.mkdir()
    header = {key: value for key, value in metadata.items() if key not in ("images", "image_ids", "num_images")}
    (state / "run.json").write_text(json.dumps({**header, "token": "t", "planned": [1, 2, 3]}))
    lines = [json.dumps(entry) for entry in metadata["images"]]
    torn = lines[2][:40]
    (state / "rank-0.jsonl").write_bytes(f"{lines[0]}\n{lines[1]}\n{torn}".encode() + b"\xff\0\0")
    (state / "rank-1.jsonl").write_text('{"id": "../../x", "reason": 1}\n[1]\n{"bytes": 3}\nnull\n')
    leftovers = [tmp_path / ".embedding_000000000003.0123.tmp", state / ".embedding_run.0123.tmp"]
    for leftover in leftovers:
        leftover.write_text("half")
    run = extract(tmp_path, [1, 2, 3])
    assert sorted(run.finished) == [1, 2]
    assert len(contents(tmp_path)) == 3


def test_a_damaged_state_names_its_file(tmp_path: Path) -> None:
    (tmp_path / ".extraction").mkdir()
    (tmp_path / ".extraction" / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is damaged .* Remove .*\.extraction"):
        extract(tmp_path, [1])


def test_a_run_that_came_and_went_since_the_plan_is_noticed(tmp_path: Path) -> None:
    late = extract(tmp_path / "a", [])
    late.folder, late.images = tmp_path, {1: ImageEntry(1, "1.jpg", 8, 8, (8, 8))}
    late.inspect()
    extract(tmp_path, [1, 2])
    late.begin()
    assert sorted(late.finished) == [1, 2]
    late.join(0)
    late.leave(done=True)
    assert [entry.image_id for entry in late.finish(1).images] == [1, 2]


def test_a_run_waits_for_the_journals_of_a_dead_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".extraction").mkdir()
    journal = Journal(tmp_path / ".extraction" / "rank-1.jsonl")
    monkeypatch.setattr("detr_lightning.extraction.locks.PATIENCE", 0.5)
    with pytest.raises(BusyError, match="still locked by a process of an earlier run"):
        lock_folder(tmp_path)
    journal.close(done=False)
    lock_folder(tmp_path).close()


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_args: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(OSError, match=r"lock cannot be locked \(Function not implemented\)"):
        lock_folder(tmp_path)


@pytest.mark.slow
def test_two_commands_on_one_folder(job: Job) -> None:
    first = job.start("--data.num_workers", "1", patch=slow(0.1))
    job.until_files(2, first)
    second = job.start()
    assert second.wait() == 1
    text = message(second.err)
    assert f"in use by another extraction (process {first.pid} on " in text
    assert first.poll() is None
    first.signal()
    assert first.wait() == -9
    job.finish()  # not refused, though a data worker of the killed one may still be alive


@pytest.mark.slow
def test_stop_iteration_in_a_step_is_no_success(job: Job) -> None:
    patch = """
from detr_lightning.extractor import DETRExtractor
step = DETRExtractor.predict_step
def stopping(self, batch, batch_idx=0, dataloader_idx=0):
    if batch_idx == 38:
        raise StopIteration
    return step(self, batch)
DETRExtractor.predict_step = stopping
"""
    run = job.start(patch=patch)
    assert run.wait() == 1
    assert "2 of 40 images have no whole file" in message(run.err)
    assert job.unfinished
    until(lambda: len(job.files) == 38, 1)
    job.finish()


@pytest.mark.slow
def test_adding_images_survives_a_kill(job: Job, tmp_path: Path) -> None:
    few = job.start("--data.limit", "20")
    assert few.wait() == 0, few.err
    more = job.start(patch=slow())
    job.until_files(25, more)
    more.signal()
    more.wait()
    assert not (job.folder / "metadata.json").exists()
    job.finish()
