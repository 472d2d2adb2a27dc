"""The reports of the command: its plan, its messages, its numbers in a file."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from coco_factory import Coco
from lightning.pytorch import Trainer
from ran import RunCLI

from detr_lightning.command import reports


def test_the_plan_names_device_precision_and_threads(
    run_cli: RunCLI, coco_folder: Coco, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = 5.0
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    quiet = run_cli("predict", *coco_folder.data, "--dry_run").err
    assert "on cpu in 32-true, 1 thread" in quiet
    assert "OMP_NUM_THREADS" not in quiet
    monkeypatch.setattr(reports, "threads_per_rank", lambda trainer: 2)
    monkeypatch.setattr(reports, "available_cores", lambda: 2)
    slow = ("--dry_run", "--allow_slow_precision", "--trainer.precision")
    busy = run_cli("predict", *coco_folder.data, *slow, "bf16-mixed").err
    assert "on cpu in bf16-mixed, 2 threads" in busy
    assert "OMP_NUM_THREADS=1 may be faster" in busy
    load = 0.9  # the imports of this very command
    assert "OMP_NUM_THREADS" not in run_cli("predict", *coco_folder.data, "--dry_run").err


def test_counts_agree_when_images_are_skipped(run_cli: RunCLI, coco_folder: Coco, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number, path in enumerate(sorted(coco_folder.images.iterdir())):
        (images / path.name).write_bytes(b"broken" if number == 0 else path.read_bytes())
    argv = ("--data.image_dir", images, *coco_folder.data[4:], "--data.on_error", "skip")
    ran = run_cli("predict", *argv, "--output_dir", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert "7 images to " in ran.err
    assert "1 more cannot be read" in ran.err
    assert re.search(r"written +│ 7 images", ran.err)
    assert re.search(r"skipped +│ 1 image", ran.err)
    verb, folder = ran.err.rstrip().splitlines()[-1].removeprefix("Next: detr-lightning ").split()
    assert run_cli(verb, folder).code == 0


def test_images_and_embeddings_need_folders_of_their_own(run_cli: RunCLI, coco_folder: Coco) -> None:
    ran = run_cli("predict", *coco_folder.data, "--output_dir", coco_folder.images)
    assert ran.code == 1
    assert "is data.image_dir" in ran.err


def test_the_first_command_tells_how_to_get_the_images(
    run_cli: RunCLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = run_cli("predict", "--config", "decoder")
    assert ran.code == 1
    assert "--data.download true" in ran.err
    ran = run_cli("predict", "--config", "decoder", "--data.download", "true", "--dry_run")
    assert ran.code == 1
    assert "--dry_run downloads nothing" in ran.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["predict", "validate"])
def test_only_predict_promises_that_something_is_kept(
    verb: str, run_cli: RunCLI, coco_folder: Coco, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, verb, interrupt)
    monkeypatch.chdir(tmp_path)
    ran = run_cli(verb, *coco_folder.data)
    assert ran.code == 130
    assert ran.err.rstrip().splitlines()[-1].startswith("Error: Interrupted.")
    assert ("What is finished is kept" in ran.err) == (verb == "predict")


def test_a_full_gpu_ends_in_one_message(
    run_cli: RunCLI, coco_folder: Coco, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 79 GiB in all.")

    monkeypatch.setattr(Trainer, "predict", fill)
    ran = run_cli("predict", *coco_folder.data, "--output_dir", tmp_path / "out")
    assert ran.code == 1
    said = ran.err.rstrip().splitlines()[-1]
    assert said.startswith("Error: ")
    assert "data.batch_size" in said
    assert "What is finished is kept" in said
    assert "Traceback" not in ran.err


def test_validate_writes_its_numbers(run_cli: RunCLI, coco_folder: Coco, tmp_path: Path) -> None:
    output = tmp_path / "new" / "metrics.json"
    ran = run_cli("validate", *coco_folder.data, "--output", output)
    assert ran.code == 0, ran.err
    content = json.loads(output.read_text())
    assert (content["model"], content["num_images"]) == ("tiny.pth", 8)
    for name in ("AP", "AP50", "ARl"):
        assert re.search(rf"│ {name} +│ +{re.escape(f'{content[name]:.3f}')} │", ran.out)
    ran = run_cli("validate", *coco_folder.data, "--output", tmp_path)
    assert ran.code == 1
    assert "is a folder" in ran.err
