"""Disks that are full or read-only, and threads and processes that fail on the way to them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness import Job, contents, group_of, message, slow

from detr_lightning.extraction.journal import Journal

UNCHECKED = "import detr_lightning.command.cli; detr_lightning.command.cli.free_bytes = lambda folder: 10**12\n"
"""Let a run begin although there is not enough room, as if another program took it later."""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a file system in memory, with these options; again to change them."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = False

    def mount(options: str) -> Path:
        nonlocal mounted
        options = f"remount,{options}" if mounted else options
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, check=False
        )
        if done.returncode:
            pytest.skip(f"mounting is not allowed here: {done.stderr.decode().strip()}")
        mounted = True
        return folder

    if shutil.which("mount") is None or os.geteuid():
        pytest.skip("only root can mount a small disk")
    yield mount
    if mounted:
        subprocess.run(["umount", "-l", folder], check=True)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Forbid new files in a folder, to root too."""
    if os.geteuid():
        folder.chmod(0o555)
    elif shutil.which("chattr") is None or subprocess.run(["chattr", "+i", folder], check=False).returncode:
        pytest.skip("root can write everywhere on this file system")
    try:
        yield
    finally:
        if os.geteuid():
            folder.chmod(0o755)
        else:
            subprocess.run(["chattr", "-i", folder], check=True)


@pytest.mark.slow
def test_a_disk_that_is_too_small_is_refused_at_the_start(job: Job, small_disk: Callable[[str], Path]) -> None:
    job.folder = small_disk("size=200k") / "out"
    run = job.start()
    assert run.wait() == 1
    text = message(run.err)
    assert f"{job.folder} needs 418.6 kB, but its disk has 204.8 kB free" in text
    assert not job.folder.exists()


@pytest.mark.slow
def test_a_disk_that_fills_up(job: Job, small_disk: Callable[[str], Path]) -> None:
    job.folder = small_disk("size=200k") / "out"
    run = job.start(patch=UNCHECKED)
    assert run.wait() == 1
    text = message(run.err)
    assert "No space left on device" in text
    assert f"{job.folder}/embedding_" in text
    assert "needs about 10" in text
    assert "run the same command again" in text
    assert job.unfinished
    whole = len(job.files)
    assert 5 < whole < 20
    small_disk("size=2m")
    assert f"{whole} more are finished" in job.finish().err


@pytest.mark.slow
def test_a_disk_that_is_full_when_the_metadata_comes(job: Job, small_disk: Callable[[str], Path]) -> None:
    job.folder = small_disk("size=2m") / "out"
    ballast = job.folder.parent / "ballast"
    fill = f"""
import contextlib
from detr_lightning.extraction import run
def fill(folder):
    with contextlib.suppress(OSError), open({str(ballast)!r}, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
run.fsync_folder = fill
"""
    run = job.start(patch=fill)
    assert run.wait() == 1
    assert f"{job.folder}/metadata.json needs about" in message(run.err)
    assert job.unfinished
    ballast.unlink()
    assert "40 more are finished" in job.finish().err


@pytest.mark.slow
def test_a_limit_on_the_size_of_files(job: Job) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (8000, resource.RLIM_INFINITY))"
    run = job.start(patch=limit)
    assert run.wait() == 1
    text = message(run.err)
    assert "File too large" in text
    assert f"{job.folder}/embedding_" in text
    assert job.unfinished
    assert not job.files
    job.finish()


def test_a_journal_on_a_full_disk_names_itself() -> None:
    journal = Journal(Path("/dev/full"))
    with pytest.raises(OSError, match=r"No space left on device: /dev/full needs \d+ bytes"):
        journal.add({"id": 1})
    journal.close(done=False)


@pytest.mark.slow
def test_a_folder_that_turns_read_only(job: Job) -> None:
    run = job.start(patch=slow())
    job.until_files(4, run)
    with read_only(job.folder):
        assert run.wait() == 1
        assert str(job.folder) in message(run.err)
        again = job.start()
        assert again.wait() == 1
        message(again.err)
    assert job.unfinished
    job.finish()


@pytest.mark.slow
def test_a_read_only_file_system(job: Job, small_disk: Callable[[str], Path]) -> None:
    job.folder = small_disk("ro,size=2m") / "out"
    run = job.start()
    assert run.wait() == 1
    assert f"Read-only file system: '{job.folder}" in message(run.err)


@pytest.mark.slow
@pytest.mark.parametrize("error", ["OSError(5, 'Input/output error', 'there')", "StopIteration"])
def test_a_writer_thread_that_fails(job: Job, error: str) -> None:
    patch = f"""
from detr_lightning.extraction.run import ExtractionRun
save = ExtractionRun.save
def failing(self, image_id, *args):
    if image_id == 61:
        raise {error}
    return save(self, image_id, *args)
ExtractionRun.save = failing
"""
    run = job.start("--data.num_workers", "1", patch=patch)
    assert run.wait() == 1
    text = message(run.err)
    assert "Input/output error" in text or "images have no whole file" in text
    assert job.unfinished
    job.finish()


@pytest.mark.slow
def test_a_data_worker_that_is_killed(job: Job) -> None:
    run = job.start("--data.num_workers", "1", patch=slow())
    job.until_files(4, run)
    (worker,) = [pid for pid in group_of(run.pid) if pid != run.pid]
    os.kill(worker, signal.SIGKILL)
    assert run.wait(60) == 1
    text = message(run.err)
    assert "A data worker ended unexpectedly" in text
    assert "data.num_workers" in text
    assert job.unfinished
    job.finish()


@pytest.mark.slow
def test_file_modes_follow_the_umask(job: Job) -> None:
    run = job.start("--data.limit", "2", patch="import os; os.umask(0o027)")
    assert run.wait() == 0, run.err
    contents(job.folder)
    assert {path.stat().st_mode & 0o777 for path in job.folder.iterdir()} == {0o640}
