"""One Lance table that is killed at random moments, by any number of ranks, and by two commands at once."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import torch
from harness import Job, slow

pytest.importorskip("lance", reason="pylance, of the extra lance, is not installed")

from detr_lightning import EmbeddingStore
from detr_lightning.format import object_store, table
from detr_lightning.store.verify import verify

TO_TABLE = ("--writer.layout", "lance", "--writer.commit_seconds", "0.2")


def committed(folder: Path) -> int:
    return table.Table(folder).dataset.count_rows() if object_store.exists(folder) else 0


def assert_whole(job: Job) -> None:
    """Check that the table has each image once, with the tensors of an undisturbed run's files."""
    expected, store = EmbeddingStore(job.undisturbed), EmbeddingStore(job.folder)
    assert store.image_ids == expected.image_ids
    assert committed(job.folder) == len(expected)
    for image_id in store:
        for key, tensor in store[image_id].items():
            assert torch.equal(tensor, expected.load(image_id, key)), (image_id, key)
    assert verify(job.folder) == []


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.endurance)])
def test_kills_and_resumes_by_any_number_of_ranks(job: Job, kills: int) -> None:
    seed = time.time_ns()
    print(f"seed {seed}")
    chance = random.Random(seed)
    for kill in range(kills):
        running = job.ranks(*TO_TABLE, patch=slow(0.2), number=(2, 1, 3)[kill % 3])
        until = time.monotonic() + 60
        goal = min(committed(job.folder) + chance.randint(0, 2), 34)
        while committed(job.folder) < goal and running[0].poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(0.5 * chance.random())
        for run in chance.sample(running, len(running)):
            run.signal()
        for run in running:
            run.wait()
        assert not (job.folder / "metadata.json").exists()
    for run in job.ranks(*TO_TABLE):
        assert run.wait() == 0, run.err
    assert_whole(job)


@pytest.mark.slow
def test_a_second_command_is_refused_while_one_is_at_work(job: Job) -> None:
    first = job.start(*TO_TABLE, patch=slow(0.2))
    while not committed(job.folder):
        time.sleep(0.02)
    second = job.start(*TO_TABLE)
    assert second.wait() == 1
    assert "is in use by another extraction" in second.err
    assert first.wait() == 0, first.err
    assert_whole(job)
