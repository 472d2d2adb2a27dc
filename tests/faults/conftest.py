"""Commands that are started, hurt, and waited for."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from coco_factory import Coco, make_coco
from harness import ONE, PATIENCE, Job, Started, Zygote, free_port


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    zygote = Zygote(tmp_path_factory.mktemp("zygote"))
    yield zygote
    zygote.process.communicate(timeout=PATIENCE)


@pytest.fixture
def start(zygote: Zygote, tiny_weights: Path) -> Iterator[Callable[..., Started]]:
    """Start the command in a process of its own; `patch` is Python that it runs before."""
    all_started = []

    def start(*args: str | Path, **options: Any) -> Started:
        started = zygote.start("predict", "--model.weights", tiny_weights, *args, **options)
        all_started.append(started)
        return started

    yield start
    for started in all_started:
        if started.poll() is None:
            started.signal(signal.SIGKILL, group=True)
            started.wait()


@pytest.fixture
def ranks(start: Callable[..., Started]) -> Callable[..., list[Started]]:
    """Start a command on several ranks as torchrun does, which imports nothing twice."""

    def ranks(
        *args: str | Path,
        patch: str | tuple[str, str] = "",
        number: int = 2,
        nodes: int = 1,
        folders: Sequence[Path] = (),
        **env: str,
    ) -> list[Started]:
        patches = (patch,) * number if isinstance(patch, str) else patch
        common = {
            "WORLD_SIZE": str(number),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "GROUP_RANK": "0",
        }
        common |= {"TORCHELASTIC_RUN_ID": "test", "LOCAL_WORLD_SIZE": str(number // nodes), **env}
        devices = ("--trainer.num_nodes", str(nodes), "--trainer.devices", str(number // nodes))
        return [
            start(
                *args,
                *("--trainer.strategy", "ddp", "--trainer.accelerator", "cpu", *devices),
                patch=patches[rank],
                cwd=folders[rank] if folders else None,
                **common,
                RANK=str(rank),
                LOCAL_RANK=str(rank if nodes == 1 else 0),
            )
            for rank in range(number)
        ]

    return ranks


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Coco:
    """Forty images."""
    return make_coco(tmp_path_factory.mktemp("images"), 40, seed=1)


@pytest.fixture(scope="session")
def undisturbed(zygote: Zygote, images: Coco, tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves that nobody disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    run = zygote.start("predict", "--model.weights", tiny_weights, *images.data, *ONE, "--output_dir", folder)
    assert run.wait() == 0, run.err
    return folder


@pytest.fixture
def job(
    start: Callable[..., Started],
    ranks: Callable[..., list[Started]],
    images: Coco,
    undisturbed: Path,
    tmp_path: Path,
) -> Job:
    """An extraction of forty images, to be hurt."""
    return Job(start, ranks, images, undisturbed, tmp_path / "out")
