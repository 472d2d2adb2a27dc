from __future__ import annotations

import contextlib
import gc
import platform
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from coco_factory import Coco
from ran import RunCLI

from detr_lightning import job
from detr_lightning.batch import to_stored
from detr_lightning.data.loading import ImageBatches
from detr_lightning.data.records import ImageRecord
from detr_lightning.system import SideThreads, has_instructions, without_collector

DEMO = Path(__file__).parent.parent / "assets" / "demo" / "detr_demo.pth"
FAULTS = """
import resource, sys, torch
from detr_lightning import DETRExtractor

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for turn in range(20):
        torch.empty(55_000_000, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults())
DETRExtractor(sys.argv[1]).setup()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_large_tensors_take_the_memory_of_earlier_ones() -> None:
    command = [sys.executable, "-c", FAULTS, str(DEMO)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    before, after = map(int, done.stdout.split())
    assert after < before / 2


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_threads_beside_the_model_leave_it_its_cores() -> None:
    with SideThreads(2, "side") as threads:
        assert list(threads.map(lambda _: torch.get_num_threads(), range(4))) == [1] * 4
        assert torch.get_num_threads() == 2
    with SideThreads(1, "side") as threads, SideThreads(1, "other") as others:
        assert [pool.submit(lambda: None).result() for pool in (threads, others)] == [None, None]
        others.shutdown()  # sets the process's number again, before the first thread has used torch
        assert threads.submit(torch.get_num_threads).result() == 1
    with ThreadPoolExecutor(1) as later:
        assert later.submit(torch.get_num_threads).result() == 2


@pytest.mark.usefixtures("two_threads")
def test_files_are_written_by_such_threads(
    run_cli: RunCLI, coco_folder: Coco, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def observed(*arguments: Any) -> torch.Tensor:
        threads.append(torch.get_num_threads())
        return to_stored(*arguments)

    monkeypatch.setattr("detr_lightning.extraction.image_writer.to_stored", observed)
    assert run_cli("predict", *coco_folder.data, "--output_dir", tmp_path / "out").code == 0
    assert set(threads) == {1}


@pytest.mark.usefixtures("two_threads")
def test_images_of_a_batch_are_read_side_by_side() -> None:
    both = threading.Barrier(2, timeout=20)

    def read(record: ImageRecord, size: tuple[int, int]) -> tuple[torch.Tensor, dict[str, Any]]:
        both.wait()
        return torch.full((3, *size), record.image_id, dtype=torch.uint8), {}

    records = [ImageRecord(number, f"{number}.jpg", 6, 4) for number in (1, 2)]
    (batch,) = ImageBatches([records], read, lambda size: size, padded=False)
    assert [int(pixels[0, 0, 0]) for pixels in batch["pixels"]] == batch["image_id"] == [1, 2]


@pytest.mark.parametrize(
    ("cpuinfo", "there"),
    [
        ("model name : EPYC\nflags\t\t: fpu sse avx avx2 f16c\n", False),
        ("flags\t\t: avx512f avx512_bf16\n", True),
        ("flags\t\t: avx2 amx_bf16 amx_tile\n", True),
        ("Features\t: fp asimd i8mm bf16\n", True),
        ("Features\t: fp asimd\n", False),
        ("", True),
    ],
)
def test_instructions_for_bfloat16(cpuinfo: str, there: bool) -> None:
    assert has_instructions("bf16-mixed", "cpu", cpuinfo) == has_instructions("bf16-true", "cpu", cpuinfo) == there
    assert has_instructions("32-true", "cpu", cpuinfo)
    assert has_instructions("bf16-mixed", "cuda", cpuinfo)


def test_bfloat16_without_instructions_is_refused(
    run_cli: RunCLI, coco_folder: Coco, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("predict", *coco_folder.data, "--dry_run", "--trainer.precision", "bf16-mixed")
    monkeypatch.setattr(job, "has_instructions", lambda precision, device: False)
    refused = run_cli(*asked)
    assert refused.code == 1
    assert "no instructions for bfloat16. Use 32-true, or --allow_slow_precision" in refused.err
    assert run_cli(*asked, "--allow_slow_precision").code == 0
    monkeypatch.setattr(job, "has_instructions", lambda precision, device: True)
    assert run_cli(*asked).code == 0


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_comes_back_as_it_was(enabled: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with contextlib.suppress(ValueError), without_collector():
            assert not gc.isenabled()
            raise ValueError
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
