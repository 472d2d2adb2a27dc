"""Images that cannot be read: an error that names them, or a list of what was skipped, and another try."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from coco_factory import SMALL, Coco, make_coco
from harness import contents, message

Run = Callable[..., Any]
BAD = (1, 10)


@pytest.fixture
def damaged(tmp_path: Path) -> Coco:
    """Six images, of which the first is empty and the fourth cut off."""
    coco = make_coco(tmp_path, 6)
    empty, cut = (coco.images / f"{image_id:012d}.jpg" for image_id in BAD)
    empty.write_bytes(b"")
    cut.write_bytes(cut.read_bytes()[:700])
    return coco


@pytest.mark.parametrize("workers", ["0", pytest.param("1", marks=pytest.mark.slow)])
@pytest.mark.parametrize("annotated", [True, False])
def test_raise_names_the_file_and_how_to_skip(
    run_cli: Run, damaged: Coco, tmp_path: Path, workers: str, annotated: bool
) -> None:
    source = damaged.data if annotated else ("--data.image_dir", damaged.images, *SMALL)
    ran = run_cli("predict", *source, "--output_dir", tmp_path / "out", "--data.num_workers", workers)
    assert ran.code == 1
    text = message(ran.err)
    assert "'000000000001.jpg'" in text or "'000000000010.jpg'" in text
    assert "data.on_error=skip" in text
    assert not (tmp_path / "out" / "metadata.json").exists()


@pytest.mark.parametrize("annotated", [True, False])
def test_skip_lists_them_and_a_resume_tries_again(run_cli: Run, damaged: Coco, tmp_path: Path, annotated: bool) -> None:
    out = tmp_path / "out"
    source = damaged.data if annotated else ("--data.image_dir", damaged.images, *SMALL)
    command = ("predict", *source, "--output_dir", out, "--data.on_error", "skip")
    ran = run_cli(*command)
    assert ran.code == 0, ran.err
    assert "Warning: 2 images could not be read" in ran.err
    assert "000000000001.jpg: empty file" in ran.err
    failed = json.loads((out / "metadata.json").read_text())["failed"]
    assert [(entry["id"], entry["file_name"]) for entry in failed] == [(i, f"{i:012d}.jpg") for i in BAD]
    assert "empty file" in failed[0]["reason"]
    assert len(contents(out)) == 4

    assert run_cli(*command).code == 0  # still two
    assert len(json.loads((out / "metadata.json").read_text())["failed"]) == 2

    whole = make_coco(tmp_path / "whole", 6)
    shutil.copy(whole.images / "000000000001.jpg", damaged.images)
    ran = run_cli(*command)
    assert ran.code == 0
    assert "Warning: 1 image could not be read" in ran.err
    metadata = json.loads((out / "metadata.json").read_text())
    assert [entry["id"] for entry in metadata["failed"]] == [10]
    assert metadata["image_ids"] == [1, 4, 7, 13, 16]
    contents(out)


@pytest.mark.parametrize("layout", ["files", "lance"])
def test_a_finished_image_that_is_damaged_later_stays_finished(run_cli: Run, tmp_path: Path, layout: str) -> None:
    if layout == "lance":
        pytest.importorskip("lance")
    images = make_coco(tmp_path, 3).images
    command = ("predict", "--data.image_dir", images, *SMALL, "--output_dir", tmp_path / "out")
    command += ("--writer.layout", layout)
    assert run_cli(*command).code == 0
    (images / "000000000004.jpg").write_bytes(b"")
    ran = run_cli(*command)
    assert ran.code == 1
    assert "'000000000004.jpg'" in message(ran.err)
    ran = run_cli(*command, "--data.on_error", "skip")
    assert ran.code == 0
    assert "Nothing to do" in ran.err
    assert "Warning: 1 image could not be read:\n  000000000004.jpg: empty file" in ran.err


def test_a_skipped_image_of_an_overwritten_run_is_forgotten(run_cli: Run, damaged: Coco, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("predict", *damaged.data, "--output_dir", out, "--data.on_error", "skip")
    assert run_cli(*command).code == 0
    assert run_cli(*command, "--writer.if_exists", "overwrite", "--data.image_ids", "[4, 7]").code == 0
    metadata = json.loads((out / "metadata.json").read_text())
    assert (metadata["failed"], metadata["image_ids"]) == ([], [4, 7])


def test_an_image_that_failed_before_and_is_not_tried_is_missing(
    run_cli: Run, damaged: Coco, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    command = ("predict", *damaged.data, "--output_dir", out, "--data.on_error", "skip")
    assert run_cli(*command).code == 0

    def stop(*_args: object, **_kwargs: object) -> None:
        raise StopIteration

    monkeypatch.setattr("detr_lightning.extractor.DETRExtractor.predict_step", stop)
    monkeypatch.setattr("detr_lightning.data.datamodule.ImageBatches.__getitem__", lambda *_args: stop())
    ran = run_cli(*command)
    assert ran.code == 1
    assert "2 of 6 images have no whole file" in message(ran.err)


def test_bombs_are_refused_unless_the_limit_is_raised(run_cli: Run, coco_folder: Coco, tmp_path: Path) -> None:
    command = ("predict", *coco_folder.data, "--output_dir", tmp_path / "out")
    ran = run_cli(*command, "--data.max_image_pixels", "7000")
    assert ran.code == 1
    assert "refused as a decompression bomb (data.max_image_pixels)" in message(ran.err)
    assert run_cli(*command, "--data.max_image_pixels", "89478485").code == 0
