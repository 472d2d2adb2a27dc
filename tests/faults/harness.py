"""Commands that are started, hurt and waited for, and what they leave."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from coco_factory import Coco

PATIENCE = 240.0
"""Seconds after which something hangs. Machines that run tests may be slow, and do other things besides."""

ONE = ("--data.batch_size", "1")
"""Then an image's floats do not depend, in their last bits, on which images were left for its batch."""

HERE = Path(__file__).resolve().parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent.parent)}


class Started:
    """A command on its way."""

    def __init__(self, pid: int, poll: Callable[[], int | None], out: Path, err: Path) -> None:
        self.pid, self._poll, self._out, self._err = pid, poll, out, err
        self.code: int | None = None

    def poll(self) -> int | None:
        if self.code is None:
            self.code = self._poll()
        return self.code

    def wait(self, seconds: float = PATIENCE) -> int:
        until(lambda: self.poll() is not None, seconds, lambda: f"does not end\n{self.out}\n{self.err}")
        assert self.code is not None
        return self.code

    def signal(self, number: int = signal.SIGKILL, *, group: bool = False) -> None:
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid, number)

    @property
    def out(self) -> str:
        return self._out.read_text() if self._out.exists() else ""

    @property
    def err(self) -> str:
        return self._err.read_text() if self._err.exists() else ""


def until(
    condition: Callable[[], Any], seconds: float = PATIENCE, what: Callable[[], str] = lambda: "waited in vain"
) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"{what()} (after {seconds:.0f} s)")
        time.sleep(0.005)


class Zygote:
    """See zygote.py."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        command = [sys.executable, str(HERE / "zygote.py")]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=folder
        )
        assert self.ask(None) == "ready"

    def ask(self, request: dict[str, Any] | None) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if request is not None:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline().strip()
        return line if request is None else json.loads(line)

    def start(self, *args: str | Path, patch: str = "", cwd: Path | None = None, **env: str) -> Started:
        self.count += 1
        out, err = (self.folder / f"{self.count}.{name}" for name in ("out", "err"))
        request = {"args": list(map(str, args)), "patch": patch, "cwd": str(cwd or self.folder), "env": env}
        pid = self.ask({**request, "out": str(out), "err": str(err)})
        return Started(pid, lambda: self.ask({"poll": pid}), out, err)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


def contents(folder: Path, *, killed: bool = False) -> dict[str, dict[str, torch.Tensor]]:
    """Load every file of an output folder, and check that nothing else is in it, but the state of a killed run."""
    metadata = json.loads((folder / "metadata.json").read_text())
    names = [f"embedding_{image_id:012d}.pt" for image_id in metadata["image_ids"]]
    there = [path.name for path in folder.iterdir() if not (killed and path.name.startswith(".extraction"))]
    assert sorted(there) == [*names, "metadata.json"]
    assert metadata["num_images"] == len(names)
    return {name: torch.load(folder / name) for name in names}


def differences(folder: Path, other: Path, tolerance: float = 0.0) -> list[str]:
    """Name the tensors that differ between two output folders."""
    ours, theirs = contents(folder), contents(other)
    assert ours.keys() == theirs.keys()
    return [
        f"{name} {key}"
        for name, tensors in ours.items()
        for key, tensor in tensors.items()
        if tensors.keys() != theirs[name].keys() or not torch.allclose(tensor, theirs[name][key], tolerance, tolerance)
    ]


@dataclass
class Job:
    """One extraction, however often it is started."""

    starter: Callable[..., Started]
    rank_starter: Callable[..., list[Started]]
    images: Coco
    undisturbed: Path
    folder: Path

    @property
    def command(self) -> tuple[str | Path, ...]:
        return (*self.images.data, *ONE, "--output_dir", self.folder)

    def start(self, *args: str | Path, **options: Any) -> Started:
        return self.starter(*self.command, *args, **options)

    def ranks(self, *args: str | Path, **options: Any) -> list[Started]:
        return self.rank_starter(*self.command, *args, **options)

    def finish(self, *args: str | Path) -> Started:
        """Run to the end in one process, and compare the files with those of a run that nobody disturbed."""
        run = self.start(*args)
        assert run.wait() == 0, run.err
        assert differences(self.folder, self.undisturbed) == []
        return run

    def until_files(self, count: int, run: Started) -> None:
        until(lambda: len(self.files) >= count or run.poll() is not None)

    @property
    def files(self) -> list[Path]:
        """The embeddings that are there so far."""
        return sorted(self.folder.glob("embedding_*.pt"))

    @property
    def unfinished(self) -> bool:
        """Whether the folder says that it is, and holds nothing half-written."""
        return not (self.folder / "metadata.json").exists() and not list(self.folder.glob(".embedding_*"))


def slow(seconds: float = 0.05) -> str:
    """Return a patch that makes each step take longer."""
    return f"""
import time
from detr_lightning.extractor import DETRExtractor
step = DETRExtractor.predict_step
def slow(self, *args, **kwargs):
    time.sleep({seconds})
    return step(self, *args, **kwargs)
DETRExtractor.predict_step = slow
"""


def message(err: str) -> str:
    """Return the one short message with which a command ended."""
    assert "Traceback" not in err, err
    said = re.findall(r"^Error(?: \(rank \d+\))?: .*", err, re.MULTILINE | re.DOTALL)
    assert len(said) == 1, err
    text: str = said[0]
    assert text.count("\nError") == 0, err
    assert len(text) < 700, err
    return text


def group_of(group: int) -> list[int]:
    """Return the living processes of a process group."""
    living = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, rest = entry.parent.name, entry.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(rest[2]) == group and rest[0] != "Z":
            living.append(int(pid))
    return living
