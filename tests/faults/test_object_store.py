"""One Lance table on an object store, where no lock tells who is at work: kills, lost answers, two commands at once."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch
from harness import Job, message, slow
from object_store import Bucket

pytest.importorskip("lance", reason="pylance, of the extra lance, is not installed")

from detr_lightning import EmbeddingStore
from detr_lightning.format import object_store, table
from detr_lightning.store.verify import verify

pytestmark = pytest.mark.slow

TO_TABLE = ("--writer.layout", "lance", "--writer.commit_seconds", "0.2")


def on_bucket(job: Job, bucket: Bucket) -> tuple[str, ...]:
    return (*TO_TABLE, "--output_dir", f"{bucket.url}/out")


def committed(url: str) -> int:
    return table.Table(url).dataset.count_rows() if object_store.exists(url) else 0


def assert_whole(job: Job, url: str) -> None:
    """Check that the table has each image once, with the tensors of an undisturbed run's files."""
    expected, store = EmbeddingStore(job.undisturbed), EmbeddingStore(url)
    assert store.image_ids == expected.image_ids
    assert committed(url) == len(expected)
    for image_id in store:
        for key, tensor in store[image_id].items():
            assert torch.equal(tensor, expected.load(image_id, key)), (image_id, key)
    assert verify(url) == []


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.endurance)])
def test_a_killed_run_goes_on(job: Job, bucket: Bucket, kills: int) -> None:
    url, seed = f"{bucket.url}/out", time.time_ns()
    print(f"seed {seed}")
    chance = random.Random(seed)
    for kill in range(kills):
        running = job.ranks(*on_bucket(job, bucket), patch=slow(0.2), number=(2, 1, 3)[kill % 3], **bucket.environment)
        goal = min(committed(url) + chance.randint(1, 3), 34)
        while committed(url) < goal and running[0].poll() is None:
            time.sleep(0.05)
        time.sleep(0.5 * chance.random())
        for run in running:
            run.signal()
            run.wait()
        assert object_store.read_file(url, "metadata.json") is None
        assert 0 < len(EmbeddingStore(url, partial=True)) < 40
    for run in job.ranks(*on_bucket(job, bucket), **bucket.environment):
        assert run.wait() == 0, run.err
    assert_whole(job, url)


@pytest.mark.endurance
def test_a_commit_whose_answer_was_lost_adds_no_image_twice(job: Job, bucket: Bucket) -> None:
    turns = iter(range(1_000_000))

    def every_second_commit(request: dict[str, Any]) -> bool:
        return request["REQUEST_METHOD"] == "PUT" and "/_versions/" in request["PATH_INFO"] and next(turns) % 2 == 1

    bucket.lose_answer = every_second_commit
    run = job.start(*on_bucket(job, bucket), patch=slow(0.1), **bucket.environment)
    assert run.wait() == 0, run.err
    assert bucket.lost > 3
    assert_whole(job, f"{bucket.url}/out")


@pytest.mark.endurance
def test_two_commands_at_once_leave_each_image_once(job: Job, bucket: Bucket) -> None:
    for number in range(5):
        url = f"{bucket.url}/out{number}"
        options = (*TO_TABLE, "--output_dir", url)
        both = [job.start(*options, patch=slow(0.05 * (1 + rank)), **bucket.environment) for rank in range(2)]
        codes = [run.wait() for run in both]
        assert 0 in codes, [run.err for run in both]
        for run in both:
            if run.code:
                assert "Run the same command again" in message(run.err)
        assert_whole(job, url)
