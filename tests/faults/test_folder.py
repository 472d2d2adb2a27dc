"""The state of a run in a folder that others share: its removal, links in it, locks that fail, forks."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from disk import RECORD, extract

from detr_lightning.errors import BusyError, InputError
from detr_lightning.extraction import journal, locks
from detr_lightning.extraction.locks import LockedFile, is_locked
from detr_lightning.extraction.run import ExtractionRun
from detr_lightning.format import files
from detr_lightning.format.archive import WholeFiles
from detr_lightning.store import EmbeddingStore
from detr_lightning.store.verify import verify


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


FINISHED = ["embedding_000000000001.pt", "embedding_000000000002.pt", "metadata.json"]


@pytest.fixture
def fuse(tmp_path: Path) -> Iterator[Path]:
    """A mount that hides an open file under another name when it is removed, as NFS and sshfs do."""
    if shutil.which("bindfs") is None or not os.access("/dev/fuse", os.W_OK):
        pytest.skip("there is no bindfs (Debian's package of that name), or no FUSE")
    below, mount = tmp_path / "below", tmp_path / "mount"
    below.mkdir()
    mount.mkdir()
    done = subprocess.run(["bindfs", "--no-allow-other", below, mount], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"bindfs cannot mount here: {done.stderr.strip()}")
    yield mount
    subprocess.run(["fusermount", "-uz", mount], check=True)


def test_a_run_on_a_mount_that_hides_open_files(fuse: Path) -> None:
    extract(fuse / "out", [1, 2])
    assert names(fuse / "out") == FINISHED
    assert extract(fuse / "out", [1, 2]).complete
    assert verify(fuse / "out") == []


@pytest.fixture
def hiding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make removing the lock, while it is open, leave a hidden file, as on NFS."""
    opened: set[tuple[int, int]] = set()
    open_, close, unlink = os.open, os.close, os.unlink
    descriptors: dict[int, tuple[int, int]] = {}

    def tracked(path: Any, *args: Any, **kwargs: Any) -> int:
        descriptor = open_(path, *args, **kwargs)
        if str(path).endswith("lock"):
            status = os.fstat(descriptor)
            descriptors[descriptor] = status.st_dev, status.st_ino
            opened.add(descriptors[descriptor])
        return descriptor

    def closing(descriptor: int) -> None:
        opened.discard(descriptors.pop(descriptor, (0, 0)))
        close(descriptor)

    def removing(path: Any, *args: Any, dir_fd: int | None = None, **kwargs: Any) -> None:
        status = os.stat(path, dir_fd=dir_fd, follow_symlinks=False)
        if (status.st_dev, status.st_ino) in opened:
            os.rename(path, ".nfs0001", src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
        else:
            unlink(path, *args, dir_fd=dir_fd, **kwargs)

    monkeypatch.setattr(os, "open", tracked)
    monkeypatch.setattr(os, "close", closing)
    monkeypatch.setattr(os, "unlink", removing)


@pytest.mark.usefixtures("hiding")
def test_the_lock_is_closed_before_it_is_removed(tmp_path: Path) -> None:
    extract(tmp_path, [1, 2])
    assert names(tmp_path) == FINISHED


def test_what_could_not_be_removed_does_not_make_a_folder_unfinished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(locks.shutil, "rmtree", lambda *_args, **_kwargs: None)
        extract(tmp_path, [1, 2])
    (leftover,) = set(names(tmp_path)) - set(FINISHED)
    assert EmbeddingStore(tmp_path).image_ids == [1, 2]
    assert verify(tmp_path) == [f"{leftover}: the leftover state of a finished run. It can be deleted."]
    assert extract(tmp_path, [1, 2]).complete
    extract(tmp_path, [1, 2, 3])  # The next run that writes sweeps.
    assert names(tmp_path) == [*FINISHED[:2], "embedding_000000000003.pt", "metadata.json"]


def test_a_run_that_starts_while_another_finishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second run looks at the state between any two steps of the first one's removal, and loses nothing."""
    steps = threading.Barrier(2)

    def step(*_args: Any, **_kwargs: Any) -> None:
        steps.wait(10)
        steps.wait(10)

    def removal(path: Path, **options: Any) -> None:
        step()
        rmtree(path, **options)
        step()

    rmtree = shutil.rmtree
    monkeypatch.setattr(locks.shutil, "rmtree", removal)
    first = threading.Thread(target=extract, args=(tmp_path, [1, 2]))
    first.start()
    for _ in range(2):
        steps.wait(10)
        monkeypatch.setattr(locks.shutil, "rmtree", rmtree)
        before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.pt")}
        second = extract(tmp_path, [1, 2, 3])
        assert second.finished.keys() >= {1, 2}
        assert before.items() <= {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.pt")}.items()
        steps.wait(10)
    first.join()
    assert EmbeddingStore(tmp_path).image_ids == [1, 2, 3]


def test_a_lock_that_was_moved_away_is_taken_anew(tmp_path: Path) -> None:
    state = tmp_path / ".extraction"
    state.mkdir()
    held = LockedFile(state / "lock")
    waited: list[Any] = []

    def lock() -> LockedFile | None:
        try:
            return locks.lock_folder(tmp_path)
        except BusyError:
            return None

    def wait() -> None:
        while not waited or waited[-1] is None:
            waited.append(lock())

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.02)
    locks.remove_state(tmp_path, held)
    waiting.join()
    assert isinstance(waited[-1], LockedFile)
    assert is_locked(state / "lock")
    waited[-1].close()


def test_a_state_that_is_moved_away_while_it_is_being_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Path.mkdir` looks twice: the folder that it found there may be gone when it asks whether it is one."""
    state = tmp_path / ".extraction"
    state.mkdir()
    is_dir = Path.is_dir

    def moving(path: Path, **options: Any) -> bool:
        if path == state and not (tmp_path / "moved").exists():
            state.rename(tmp_path / "moved")
        return is_dir(path, **options)

    monkeypatch.setattr(Path, "is_dir", moving)
    lock = locks.lock_folder(tmp_path)
    assert (tmp_path / "moved").exists()
    assert is_locked(state / "lock")
    lock.close()


def test_a_file_in_the_place_of_the_state(tmp_path: Path) -> None:
    (tmp_path / ".extraction").write_text("mine")
    with pytest.raises(NotADirectoryError, match=r"\.extraction"):
        extract(tmp_path, [1])
    assert (tmp_path / ".extraction").read_text() == "mine"


def test_a_lock_that_was_given_up_is_not_taken_for_the_next_one(tmp_path: Path) -> None:
    first = LockedFile(tmp_path / "first")
    first.close()
    second = LockedFile(tmp_path / "second")  # The system gives it the same descriptor.
    assert first.closed
    first.close()
    assert not second.closed
    assert is_locked(tmp_path / "second")
    second.close()


def test_a_refused_run_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", no_locks)
        with pytest.raises(OSError, match="cannot be locked"):
            extract(tmp_path / "a" / "out", [1])
    assert not (tmp_path / "a" / "out").exists()

    run = ExtractionRun(tmp_path / "out", RECORD, [])
    run.inspect()
    extract(tmp_path / "out", [1, 2])
    changed = ExtractionRun(tmp_path / "out", RECORD, [], if_exists="error")
    changed._previous = run._previous  # It looked when the folder was empty.
    with pytest.raises(FileExistsError):
        changed.begin()
    assert names(tmp_path / "out") == FINISHED


@pytest.mark.parametrize("name", [".extraction", "lock", "run.json", "done.jsonl", "rank-0.jsonl"])
def test_no_link_in_the_state_is_followed(tmp_path: Path, name: str) -> None:
    out, outside = tmp_path / "out", tmp_path / "outside"
    state = out / ".extraction"
    out.mkdir()
    if name == ".extraction":
        outside.mkdir()
        state.symlink_to(outside)
    else:
        state.mkdir()
        outside.write_text("precious")
        (state / "run.json").write_text('{"token": "1", "planned": [], "void": true}')
        (state / name).unlink(missing_ok=True)
        (state / name).symlink_to(outside)
    with pytest.raises(InputError, match="link"):
        extract(out, [1, 2])
    if name == ".extraction":
        assert names(outside) == []
    else:
        assert outside.read_text() == "precious"


def test_a_file_of_embeddings_that_is_a_link_is_not_whole_and_not_written_through(tmp_path: Path) -> None:
    out, outside = tmp_path / "out", tmp_path / "outside.pt"
    extract(out, [1, 2])
    path = out / FINISHED[0]
    path.rename(outside)
    path.symlink_to(outside)
    assert any("is a link" in problem for problem in verify(out))
    outside_before = outside.read_bytes()
    outside.write_bytes(outside_before)
    run = extract(out, [1, 2])
    assert list(run.finished) == [2]
    assert not path.is_symlink()
    assert outside.read_bytes() == outside_before
    assert verify(out) == []


@pytest.mark.parametrize("number", [errno.ENOTCONN, errno.ESTALE, errno.EIO])
def test_a_lock_that_cannot_be_asked_is_an_error_and_no_endless_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    locked = LockedFile(tmp_path / "rank-1.jsonl")

    def broken(*_args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(OSError, match="cannot be locked") as raised:
        is_locked(tmp_path / "rank-1.jsonl")
    assert raised.value.errno == number
    with pytest.raises(OSError, match="cannot be locked"):
        journal.await_done([tmp_path / "rank-1.jsonl"])
    locked.close()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_gives_the_lock_up_whatever_other_threads_do(tmp_path: Path) -> None:
    # In a process of its own: what other tests have imported has threads and fork hooks, too.
    code = f"""
import os, threading, time
from pathlib import Path
from detr_lightning.extraction.journal import Journal
from detr_lightning.extraction.locks import is_locked
path = Path({str(tmp_path / "rank-0.jsonl")!r})
log = Journal(path)
stop = threading.Event()
def write():
    while not stop.is_set():
        log.add({{"id": 1}})
writers = [threading.Thread(target=write) for _ in range(2)]
for writer in writers:
    writer.start()
children = []
wait, end_all = os.pipe()
for _ in range(50):
    child = os.fork()
    if child == 0:
        os.close(end_all)
        os.read(wait, 1)
        os._exit(0)
    children.append(child)
stop.set()
for writer in writers:
    writer.join()
log.close(done=False)
end = time.monotonic() + 20
while is_locked(path) and time.monotonic() < end:  # by a child that had no turn yet
    time.sleep(0.01)
assert not is_locked(path)
os.close(end_all)
while children and time.monotonic() < end:
    children = [child for child in children if os.waitpid(child, os.WNOHANG) == (0, 0)]
    time.sleep(0.05)
assert children == []
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_a_line_that_does_not_fit_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = journal.Journal(tmp_path / "rank-0.jsonl")
    log.add({"id": 1})
    write = os.write

    def half(descriptor: int, data: bytes) -> int:
        if len(data) < 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[: len(data) // 2])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half)
        with pytest.raises(OSError, match="needs 10 bytes"):
            log.add({"id": 2})
    log.add({"id": 3})
    assert (tmp_path / "rank-0.jsonl").read_text() == '{"id": 1}\n{"id": 3}\n'
    log.close(done=False)


def test_any_flipped_bit_of_a_zip_directory_ends_in_a_resume(tmp_path: Path) -> None:
    extract(tmp_path, [1])
    path = tmp_path / FINISHED[0]
    data = path.read_bytes()
    start = data.index(b"PK\x01\x02")
    for bit in range(start * 8, len(data) * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert isinstance(WholeFiles().is_whole(path, len(data)), bool), bit
    path.write_bytes(data[:start] + b"PK\x01\x02\xff" * 20 + data[start + 100 :])
    assert extract(tmp_path, [1]).finished == {}
    assert verify(tmp_path) == []


def test_whole_files_are_told_by_their_directory(tmp_path: Path) -> None:
    extract(tmp_path, [1, 2])
    first, second = (tmp_path / name for name in FINISHED[:2])
    size = first.stat().st_size
    whole = WholeFiles()
    assert whole.is_whole(first, size)
    assert whole.is_whole(second, size)
    data = bytearray(second.read_bytes())
    data[data.index(b"PK\x01\x02") + 46] ^= 1  # a name in the directory
    second.write_bytes(data[:-1])
    assert not whole.is_whole(second, size)
    second.write_bytes(b"x" * size)
    assert not whole.is_whole(second, size)


def test_a_disk_without_inodes_is_called_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = SimpleNamespace(f_files=100, f_favail=0, f_bavail=1000, f_frsize=4096)
    monkeypatch.setattr(files.os, "statvfs", lambda _path: disk)
    for number, expected in ((errno.ENOSPC, "no inodes left"), (errno.EDQUOT, "needs about 10 bytes")):
        with pytest.raises(OSError, match=expected), files.replacing(tmp_path / "a", 10):
            raise OSError(number, os.strerror(number))


def test_a_link_to_nowhere_as_output_folder(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"out is a link to .*none, which does not exist"):
        extract(tmp_path / "out", [1])


def test_a_later_chdir_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from detr_lightning import EmbeddingWriter

    extract(tmp_path / "out", [1])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    store, writer = EmbeddingStore("out"), EmbeddingWriter("out")
    dataset = store.dataset("query_embeddings")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert store[1]["query_embeddings"].tolist() == [[1.0, 1.0, 1.0]]
    assert dataset[0][0].tolist() == [[1.0, 1.0, 1.0]]
    assert writer.output_dir == tmp_path / "out"


def test_a_journal_that_is_a_link_is_a_reason_and_no_error(tmp_path: Path) -> None:
    (tmp_path / "rank-1.jsonl").symlink_to(tmp_path / "elsewhere")
    assert "link" in str(journal.why_unseen(tmp_path / "rank-1.jsonl"))
