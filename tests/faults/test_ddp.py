"""Several ranks: as torchrun starts them, as Lightning starts them, and what becomes of one when another dies."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from coco_factory import Coco, make_coco
from harness import (
    ENVIRONMENT,
    ONE,
    PATIENCE,
    Job,
    Started,
    contents,
    differences,
    free_port,
    group_of,
    message,
    slow,
    until,
)

CLI = Path(__file__).resolve().parent.parent.parent / "cli.py"


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 7])
def test_few_images_on_two_ranks(
    ranks: Callable[..., list[Started]], start: Callable[..., Started], tmp_path: Path, count: int
) -> None:
    coco = make_coco(tmp_path / "coco", count)
    both = ranks(*coco.data, "--output_dir", tmp_path / "two")
    assert [run.wait() for run in both] == [0, 0], both[0].err + both[1].err
    alone = start(*coco.data, "--output_dir", tmp_path / "one")
    assert alone.wait() == 0, alone.err
    assert differences(tmp_path / "two", tmp_path / "one", 1e-5) == []
    assert len(contents(tmp_path / "two")) == count
    assert both[1].err == ""  # rank 0 alone speaks


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_type",
    [
        "rf_detr",
        *(
            pytest.param(name, marks=pytest.mark.endurance)
            for name in ("rt_detr_v2", "d_fine", "deformable_detr", "conditional_detr")
        ),
    ],
)
def test_other_detectors_on_two_ranks(
    ranks: Callable[..., list[Started]],
    start: Callable[..., Started],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "model")
    from family_reference import build, save

    weights = save(build(model_type), tmp_path / "weights")
    images = make_coco(tmp_path / "coco", 5).images
    command = ("--model.weights", weights, "--data.image_dir", images, "--extract_type", "all", "--data.batch_size")
    both = ranks(*command, "2", "--output_dir", tmp_path / "two")
    assert [run.wait() for run in both] == [0, 0], both[0].err + both[1].err
    alone = start(*command, "4", "--output_dir", tmp_path / "one")
    assert alone.wait() == 0, alone.err
    assert differences(tmp_path / "two", tmp_path / "one") == []
    assert len(contents(tmp_path / "two")) == 5


@pytest.mark.slow
def test_finished_run_on_two_ranks_returns_at_once(job: Job) -> None:
    job.finish()
    decoding = "from detr_lightning.data import loading; loading.read_image = None"
    again = job.ranks("--trainer.devices", "2", patch=decoding)
    assert [run.wait() for run in again] == [0, 0], again[0].err
    assert "Nothing to do" in again[0].err


@pytest.mark.slow
def test_a_nearly_finished_run_leaves_nothing_for_a_rank(job: Job) -> None:
    run = job.start(patch=slow())
    job.until_files(38, run)
    run.signal()
    run.wait()
    both = job.ranks()
    assert [run.wait() for run in both] == [0, 0], both[0].err + both[1].err
    job.finish()


@pytest.mark.endurance
def test_no_rank_loses_patience_with_a_slow_one(job: Job) -> None:
    patience = """
import functools
from datetime import timedelta
from lightning.pytorch.strategies import DDPStrategy
init = DDPStrategy.__init__
@functools.wraps(init)
def impatient(self, *args, **kwargs):
    init(self, *args, **{**kwargs, "timeout": timedelta(seconds=10)})
DDPStrategy.__init__ = impatient
"""
    both = job.ranks(patch=(patience, patience + slow(0.7)))
    assert [run.wait() for run in both] == [0, 0], both[0].err + both[1].err
    job.finish()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["StopIteration", "an exception", "SIGKILL"])
def test_rank_1_ends_early(job: Job, fault: str) -> None:
    patch = f"""
import os
from detr_lightning.errors import InputError
from detr_lightning.extractor import DETRExtractor
step = DETRExtractor.predict_step
def dying(self, batch, batch_idx=0, dataloader_idx=0):
    if batch_idx == 18:
        if {fault!r} == "SIGKILL":
            os.kill(os.getpid(), 9)
        raise StopIteration if {fault!r} == "StopIteration" else InputError("rank 1 has had enough")
    return step(self, batch)
DETRExtractor.predict_step = dying
"""
    zero, one = job.ranks(patch=("", patch))
    assert zero.wait() == 1
    assert one.wait() == {"StopIteration": 0, "an exception": 1, "SIGKILL": -9}[fault]
    if fault == "StopIteration":
        assert "2 of 40 images have no whole file" in message(zero.err)
        assert one.err == ""
    else:
        assert "rank-1 ended before it had processed" in message(zero.err)
    if fault == "an exception":
        assert message(one.err) == "Error (rank 1): rank 1 has had enough\n"
    assert not (job.folder / "metadata.json").exists()
    job.finish()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_while_the_run_is_being_set_up(job: Job, rank: int) -> None:
    dying = """
import os
from detr_lightning.extraction.run import ExtractionRun
ExtractionRun.join = lambda self, rank: os.kill(os.getpid(), 9)
"""
    both = job.ranks(patch=("", dying) if rank else (dying, ""))
    assert both[rank].wait() == -9
    assert both[1 - rank].wait(60) == 1
    assert "nother rank ended" in message(both[1 - rank].err)
    job.finish()


@pytest.mark.slow
def test_rank_1_cannot_write(job: Job) -> None:
    failing = """
from detr_lightning.extraction.run import ExtractionRun
def join(self, rank):
    raise PermissionError(13, "Permission denied", "there")
ExtractionRun.join = join
"""
    zero, one = job.ranks(patch=("", failing))
    assert [zero.wait(), one.wait()] == [1, 1]
    assert message(zero.err).startswith("Error: rank 1 of 2: [Errno 13] Permission denied: 'there'")
    assert one.err == ""
    job.finish()


@pytest.mark.slow
def test_rank_0_refuses_and_the_others_are_silent(job: Job) -> None:
    job.finish()
    both = job.ranks("--writer.dtype", "float16")
    assert [run.wait() for run in both] == [1, 1]
    assert "writer.dtype was float32, now float16" in message(both[0].err)


@pytest.mark.slow
def test_if_exists_error_on_two_ranks(job: Job) -> None:
    both = job.ranks("--writer.if_exists", "error")
    assert [run.wait() for run in both] == [0, 0], both[0].err + both[1].err
    job.finish()


@pytest.mark.slow
def test_nodes_must_share_the_output_folder(ranks: Callable[..., list[Started]], images: Coco, tmp_path: Path) -> None:
    nodes = tmp_path / "node 0", tmp_path / "node 1"
    for node in nodes:
        node.mkdir()
    both = ranks(*images.data, "--output_dir", "out", nodes=2, folders=nodes)
    assert [run.wait() for run in both] == [1, 1]
    text = message(both[0].err)
    assert "rank 1 of 2" in text
    assert "share" in text
    assert both[1].err == ""


@pytest.mark.slow
def test_locks_must_reach_all_nodes(job: Job) -> None:
    both = job.ranks(patch=("", "import fcntl; fcntl.flock = lambda *args: None"))
    assert [run.wait() for run in both] == [1, 1]
    assert "rank 1 of 2: its lock on " in message(both[0].err)
    assert both[1].err == ""
    job.finish()


@pytest.mark.endurance
def test_two_nodes_of_torchrun(tiny_weights: Path, images: Coco, undisturbed: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{free_port()}", str(CLI), "predict"]
    command += ["--trainer.num_nodes", "2", "--trainer.devices", "1", "--trainer.strategy", "ddp"]
    command += ["--trainer.accelerator", "cpu", "--model.weights", str(tiny_weights), *images.data, *ONE]
    agents = [
        subprocess.Popen([*command, "--output_dir", str(tmp_path / "out")], env=ENVIRONMENT, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    said = [agent.communicate(timeout=PATIENCE)[1].decode() for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(said)
    assert differences(tmp_path / "out", undisturbed) == []


@pytest.fixture
def long(tmp_path: Path, images: Coco) -> Coco:
    """Two thousand images that are forty files: enough to be in the middle of, whenever that is."""
    content = json.loads(images.annotations.read_text())
    entries = content["images"] * 50
    content["images"] = [{**entry, "id": number} for number, entry in enumerate(entries)]
    path = tmp_path / "long.json"
    path.write_text(json.dumps(content))
    return Coco(images.images, path)


@pytest.mark.slow
@pytest.mark.parametrize("when", [pytest.param("importing", marks=pytest.mark.endurance), "writing"])
def test_orphans_end_and_a_resume_waits_for_them(
    start: Callable[..., Started], long: Coco, tmp_path: Path, when: str
) -> None:
    folder = tmp_path / "out"
    ddp = ("--trainer.strategy", "ddp", "--trainer.devices", "2", "--trainer.accelerator", "cpu")
    run = start(*long.data, *ONE, "--output_dir", folder, *ddp)
    journal = folder / ".extraction" / "rank-1.jsonl"
    if when == "importing":
        until(lambda: len(group_of(run.pid)) == 2 or run.poll() is not None)
    else:
        until(lambda: (journal.exists() and journal.stat().st_size) or run.poll() is not None)
    assert len(group_of(run.pid)) == 2, run.err
    run.signal()
    assert run.wait() == -9
    again = start(*long.data, "--data.limit", "10", "--output_dir", folder)
    assert again.wait() == 0, again.err
    assert len(contents(folder)) >= 10
    until(lambda: not group_of(run.pid), 60)


@pytest.mark.endurance
def test_lightning_ends_rank_0_when_rank_1_dies(start: Callable[..., Started], long: Coco, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    ddp = ("--trainer.strategy", "ddp", "--trainer.devices", "2", "--trainer.accelerator", "cpu")
    run = start(*long.data, *ONE, "--output_dir", folder, *ddp)
    journal = folder / ".extraction" / "rank-1.jsonl"
    until(lambda: (journal.exists() and journal.stat().st_size) or run.poll() is not None)
    (child,) = [pid for pid in group_of(run.pid) if pid != run.pid]
    os.kill(child, signal.SIGKILL)
    assert run.wait(60) == -9
    assert not (folder / "metadata.json").exists()
    again = start(*long.data, "--data.limit", "10", "--output_dir", folder)
    assert again.wait() == 0, again.err
    contents(folder)


@pytest.mark.slow
def test_rank_0_alone_looks_at_the_images_and_the_folder(job: Job) -> None:
    blind = """
import os
from detr_lightning.data.datamodule import COCODataModule
from detr_lightning.extraction.run import ExtractionRun
def refuse(*_, **__):
    raise AssertionError("rank 1 looks for itself")
COCODataModule.find_images = ExtractionRun.inspect = refuse
"""
    both = job.ranks(patch=("", blind))
    assert [run.wait() for run in both] == [0, 0], both[0].err + both[1].err
    again = job.ranks(patch=("", blind))
    assert [run.wait() for run in again] == [0, 0], again[0].err + again[1].err
    assert "Nothing to do" in again[0].err
    dry = job.ranks("--dry_run", patch=("", blind))
    assert [run.wait() for run in dry] == [0, 0], dry[0].err + dry[1].err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_rank_that_waits_for_the_others_can_be_ended(
    start: Callable[..., Started], images: Coco, number: int
) -> None:
    alone = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "RANK": "0"}
    alone |= {"TORCHELASTIC_RUN_ID": "test", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0", "GROUP_RANK": "0"}
    ddp = ("--trainer.strategy", "ddp", "--trainer.devices", "2", "--trainer.accelerator", "cpu")
    run = start(*images.data, *ddp, **alone)
    until(lambda: listens(int(alone["MASTER_PORT"])) or run.poll() is not None)
    run.signal(number)
    assert run.wait(60) == 130
    assert message(run.err).startswith("Error: Interrupted.")


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def ignores_ctrl_c(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    (ignored,) = re.findall(r"^SigIgn:\s*(\w+)", status, re.MULTILINE)
    return bool(int(ignored, 16) & 1 << signal.SIGINT - 1)


@pytest.mark.slow
def test_ctrl_c_while_rank_1_imports(start: Callable[..., Started], images: Coco, tmp_path: Path) -> None:
    ddp = ("--trainer.strategy", "ddp", "--trainer.devices", "2", "--trainer.accelerator", "cpu")
    run = start(*images.data, *ddp, "--output_dir", tmp_path / "out")
    until(lambda: any(map(ignores_ctrl_c, group_of(run.pid))) or run.poll() is not None)
    run.signal(signal.SIGINT, group=True)
    assert run.wait(60) == 130
    assert message(run.err).startswith("Error: Interrupted.")
    until(lambda: not group_of(run.pid), 60)
