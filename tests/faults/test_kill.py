"""SIGKILL: at random moments, and before each single operation on the disk."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from disk import extract
from harness import Job, Zygote, contents, slow, until

from detr_lightning.store import EmbeddingStore

ENDURANCE = pytest.mark.endurance


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kills", "workers"),
    [(3, "1"), pytest.param(10, "0", marks=ENDURANCE), pytest.param(10, "1", marks=ENDURANCE)],
)
def test_kills_and_a_resume_leave_what_an_undisturbed_run_leaves(job: Job, kills: int, workers: str) -> None:
    seed = time.time_ns()
    print(f"seed {seed}")
    chance = random.Random(seed)
    for _ in range(kills):
        run = job.start("--data.num_workers", workers, patch=slow())
        job.until_files(len(job.files) + chance.randint(1, 3), run)
        time.sleep(chance.choice((0, 0.02, 0.1)) * chance.random())
        assert run.poll() is None, run.err
        run.signal()
        assert run.wait() == -9
        for path in job.files:
            torch.load(path)
        assert not (job.folder / "metadata.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in recorded(job.folder)}
    job.finish()
    assert len(kept) >= 3
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items())


@pytest.mark.slow
def test_two_ranks_killed_and_resumed_by_one_and_by_two(job: Job) -> None:
    for number, goal in enumerate((8, 20)):
        running = job.ranks(patch=slow()) if number % 2 == 0 else [job.start(patch=slow())]
        job.until_files(goal, running[0])
        for run in reversed(running):
            run.signal()
        assert [run.wait() for run in running] == [-9] * len(running)
        assert not (job.folder / "metadata.json").exists()
    for run in job.ranks():
        assert run.wait() == 0, run.err
    finished = job.finish()
    assert "Nothing to do" in finished.err


def recorded(folder: Path) -> list[Path]:
    lines = [line for journal in (folder / ".extraction").glob("*.jsonl") for line in journal.read_text().splitlines()]
    return [folder / f"embedding_{entry['id']:012d}.pt" for entry in map(json.loads, lines) if "bytes" in entry]


DYING = """
import os, signal, sys
sys.path.insert(0, {here!r})
from pathlib import Path
from disk import extract
folder, operations = {folder!r}, 0
def hook(event, args):
    global operations
    writes = event == "open" and isinstance(args[1], str) and args[1][0] in "wax" or event in KINDS
    if writes and str(args[0]).startswith(folder):
        operations += 1
        if operations == {number}:
            os.kill(os.getpid(), signal.SIGKILL)
KINDS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
sys.addaudithook(hook)
extract(Path(folder), {ids}, {if_exists!r})
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "ids", "if_exists"),
    [
        pytest.param([], [1, 2], "resume", id="fresh"),
        pytest.param([1], [1, 5], "resume", id="more images"),
        pytest.param([1, 7], [1, 2], "overwrite", id="overwrite"),
    ],
)
def test_killed_before_each_operation_on_the_disk(
    zygote: Zygote, tmp_path: Path, before: list[int], ids: list[int], if_exists: str
) -> None:
    expected = sorted({*ids, *(before if if_exists == "resume" else ())})
    for number in itertools.count(1):
        folder = tmp_path / str(number)
        if before:
            extract(folder, before)
        settings = {"folder": str(folder), "number": number, "ids": ids, "if_exists": if_exists}
        dying = zygote.start(patch=DYING.format(here=str(Path(__file__).parent), **settings))
        if dying.wait() == 0:
            break
        assert dying.code == -9, dying.err
        with contextlib.suppress(FileNotFoundError):  # unfinished, it says; or else it is whole
            assert EmbeddingStore(folder).image_ids in (before, expected)
            contents(folder, killed=True)
        extract(folder, ids, if_exists)
        assert EmbeddingStore(folder).image_ids == expected, number
        loaded = contents(folder, killed=True)
        assert all((tensors["query_embeddings"] == int(name[10:22])).all() for name, tensors in loaded.items())
        shutil.rmtree(folder)
    assert number > 10
    print(f"{number - 1} kills")


@pytest.mark.slow
def test_a_kill_after_the_metadata_leaves_little_to_do(job: Job) -> None:
    run = job.start(patch="import os, pathlib; pathlib.Path.rename = lambda *args: os.kill(os.getpid(), 9)")
    assert run.wait() == -9
    with pytest.raises(FileNotFoundError, match="unfinished"):
        EmbeddingStore(job.folder)
    again = job.finish()
    assert "0 images" in again.err
    until(lambda: "40 more are finished" in again.err, 1)
