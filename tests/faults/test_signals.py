"""SIGINT and SIGTERM: an orderly end, a message, an exit code, and a folder with which the next run goes on."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from coco_factory import Coco
from harness import ONE, Started, calm, differences, files, slow, until


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("group", [False, True], ids=["process", "group"])
def test_one_process(
    start: Callable[..., Started],
    images: Coco,
    undisturbed: Path,
    tmp_path: Path,
    number: signal.Signals,
    group: bool,
) -> None:
    folder = tmp_path / "out"
    command = (*images.data, *ONE, "--data.num_workers", "1", "--output_dir", folder)
    run = start(*command, patch=slow(0.05))
    until(lambda: len(files(folder)) > 3 or run.poll() is not None)
    run.signal(number, group=group)
    assert run.wait(60) not in (0, 70, None)
    assert calm(run.err), run.err
    assert "run the same command again" in run.err, run.err
    assert not (folder / "metadata.json").exists()
    assert not list(folder.glob(".embedding_*"))
    there = len(files(folder))
    again = start(*command)
    assert again.wait() == 0, again.err
    assert 3 < there < 40
    assert f"{there} more are there already" in again.err
    assert differences(folder, undisturbed) == []


@pytest.mark.slow
def test_sigterm_while_the_run_is_being_set_up(start: Callable[..., Started], images: Coco, tmp_path: Path) -> None:
    patch = """
import time
from detr_lightning.data.datamodule import COCODataModule
def never(self):
    open("here", "w").close()
    time.sleep(2)
    return loader(self)
loader = COCODataModule.predict_dataloader
COCODataModule.predict_dataloader = never
"""
    run = start(*images.data, "--output_dir", tmp_path / "out", patch=patch, cwd=tmp_path)
    until(lambda: (tmp_path / "here").exists() or run.poll() is not None)
    run.signal(signal.SIGTERM)
    assert run.wait(60) not in (0, 70)
    assert not (tmp_path / "out" / "metadata.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["rank 0", "rank 1", "both"])
def test_sigterm_under_ddp(
    ranks: Callable[..., list[Started]],
    start: Callable[..., Started],
    images: Coco,
    undisturbed: Path,
    tmp_path: Path,
    whom: str,
) -> None:
    folder, command = tmp_path / "out", (*images.data, *ONE, "--output_dir", tmp_path / "out")
    running = ranks(*command, patches=(slow(0.05), slow(0.05)))
    until(lambda: len(files(folder)) > 3 or running[0].poll() is not None)
    for rank, run in enumerate(running):
        if whom in (f"rank {rank}", "both"):
            run.signal(signal.SIGTERM)
    if whom == "rank 0":  # torchrun and Lightning end the others
        assert running[0].wait(60) not in (0, 70), running[0].err
        running[1].signal(signal.SIGKILL)
    codes = [run.wait(60) for run in running]
    assert codes[0] not in (0, 70), running[0].err
    assert codes[1] != 0 or whom == "rank 0"
    assert all("Traceback" not in run.err for run in running), [run.err for run in running]
    assert "again" in running[0].err, running[0].err
    assert not (folder / "metadata.json").exists()
    again = start(*command)
    assert again.wait() == 0, again.err
    assert differences(folder, undisturbed) == []
