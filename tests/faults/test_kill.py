"""SIGKILL: at random moments, and before each single operation on the disk."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from coco_factory import Coco
from disk import extract
from harness import ONE, Started, Zygote, contents, differences, files, until

from detr_lightning.store import EmbeddingStore


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "1"])
def test_ten_kills_and_a_resume_leave_what_an_undisturbed_run_leaves(
    start: Callable[..., Started], images: Coco, undisturbed: Path, tmp_path: Path, workers: str
) -> None:
    folder, seed = tmp_path / "out", time.time_ns()
    print(f"seed {seed}")
    chance = random.Random(seed)
    command = (*images.data, *ONE, "--data.num_workers", workers, "--output_dir", folder)
    for _ in range(10):
        before = len(files(folder))
        run = start(*command)
        goal = before + chance.randint(0, 4)
        until(lambda run=run, goal=goal: len(files(folder)) >= goal or run.poll() is not None)  # type: ignore[misc]
        time.sleep(chance.choice((0, 0.02, 0.2)) * chance.random())
        assert run.poll() is None, run.err
        run.signal()
        assert run.wait() == -9
        for path in files(folder):
            torch.load(path)
        assert not (folder / "metadata.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in recorded(folder)}
    run = start(*command)
    assert run.wait() == 0, run.err
    assert len(kept) > 5
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items())
    assert differences(folder, undisturbed) == []


@pytest.mark.slow
def test_two_ranks_killed_and_resumed_by_one_and_by_two(
    start: Callable[..., Started],
    ranks: Callable[..., list[Started]],
    images: Coco,
    undisturbed: Path,
    tmp_path: Path,
) -> None:
    folder, command = tmp_path / "out", (*images.data, *ONE, "--output_dir", tmp_path / "out")
    for number, goal in enumerate((5, 12, 20, 28)):
        running = ranks(*command) if number % 2 == 0 else [start(*command)]
        until(lambda running=running, goal=goal: len(files(folder)) >= goal or running[0].poll() is not None)  # type: ignore[misc]
        for run in reversed(running):
            run.signal()
        assert all(run.wait() == -9 for run in running)
        assert not (folder / "metadata.json").exists()
    for run in ranks(*command):
        assert run.wait() == 0, run.err
    assert differences(folder, undisturbed) == []


def recorded(folder: Path) -> list[Path]:
    lines = [line for journal in (folder / ".extraction").glob("*.jsonl") for line in journal.read_text().splitlines()]
    return [folder / f"embedding_{entry['id']:012d}.pt" for entry in map(json.loads, lines) if "bytes" in entry]


DYING = """
import os, signal, sys
sys.path.insert(0, {here!r})
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
from pathlib import Path
sys.addaudithook(hook)
extract(Path(folder), {ids}, {if_exists!r})
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "ids", "if_exists"),
    [([], [1, 2, 3], "resume"), ([1, 2], [1, 2, 5], "resume"), ([1, 2, 7], [2, 3], "overwrite")],
    ids=["fresh", "more images", "overwrite"],
)
def test_killed_before_each_operation_on_the_disk(
    zygote: Zygote, tmp_path: Path, before: list[int], ids: list[int], if_exists: str
) -> None:
    expected = sorted({*ids, *(before if if_exists == "resume" else ())})
    for number in itertools.count(1):
        folder = tmp_path / str(number)
        if before:
            extract(folder, before)
        patch = DYING.format(
            here=str(Path(__file__).parent), folder=str(folder), number=number, ids=ids, if_exists=if_exists
        )
        dying = zygote.start(patch=patch)
        if dying.wait() == 0:
            break
        assert dying.code == -9, dying.err
        try:
            held = EmbeddingStore(folder).image_ids  # if it can be read, it is whole
        except FileNotFoundError:
            pass
        else:
            assert held in (before, expected)
            contents(folder) if not (folder / ".extraction").exists() else None
        if if_exists == "overwrite":
            extract(folder, ids, if_exists)
        extract(folder, ids)
        assert EmbeddingStore(folder).image_ids == expected, number
        loaded = contents(folder)
        assert all(tensors["query_embeddings"][0] == int(name[10:22]) for name, tensors in loaded.items())
        shutil.rmtree(folder)
    assert number > 15
