"""SIGINT and SIGTERM: an orderly end, a message, an exit code, and a folder with which the next run goes on."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from harness import Job, message, slow, until


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "group"),
    [(signal.SIGINT, True), (signal.SIGTERM, False)],
    ids=["Ctrl-C in a terminal", "SIGTERM to the process"],
)
def test_one_process(job: Job, number: signal.Signals, group: bool) -> None:
    run = job.start("--data.num_workers", "1", patch=slow())
    job.until_files(4, run)
    run.signal(number, group=group)
    assert run.wait() == 130
    assert "run the same command again" in message(run.err)
    there = len(job.files)
    assert 4 <= there < 40
    assert job.unfinished
    assert f"{there} more are finished" in job.finish().err


@pytest.mark.slow
def test_sigterm_while_the_run_is_being_set_up(job: Job, tmp_path: Path) -> None:
    patch = """
import time
from detr_lightning.data.datamodule import COCODataModule
def slow(self):
    open("here", "w").close()
    time.sleep(1)
    return loader(self)
loader = COCODataModule.predict_dataloader
COCODataModule.predict_dataloader = slow
"""
    run = job.start(patch=patch, cwd=tmp_path)
    until(lambda: (tmp_path / "here").exists() or run.poll() is not None)
    run.signal(signal.SIGTERM)
    assert run.wait() == 130
    assert "Interrupted" in message(run.err)
    job.finish()


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["rank 0", "rank 1", "both"])
def test_sigterm_under_ddp(job: Job, whom: str) -> None:
    running = job.ranks(patch=slow())
    job.until_files(4, running[0])
    hit = [run for rank, run in enumerate(running) if whom in (f"rank {rank}", "both")]
    for run in hit:
        run.signal(signal.SIGTERM)
    for run in hit:
        assert run.wait() == 130
        assert "Interrupted" in message(run.err)
    if whom == "rank 1":  # What torchrun and Lightning would end, ends by itself, when it is through.
        assert running[0].wait() == 1
        assert "rank-1 ended before" in message(running[0].err)
    elif whom == "rank 0":
        running[1].wait()
    assert job.unfinished
    job.finish()
