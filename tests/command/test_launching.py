"""Who a process is, among launchers, clusters and strategies; and options of the Trainer that are usual elsewhere."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from coco_factory import Coco
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only
from ran import RunCLI

from detr_lightning import extract
from detr_lightning.data import loading
from detr_lightning.launch import forget_stale_launchers, launched_ranks
from detr_lightning.system import available_cores

SLURM = {
    "SLURM_JOB_ID": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NNODES": "1",
    "SLURM_JOB_NODELIST": "localhost",
    "SLURM_JOB_NAME": "my_job",
}
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
LSF = {"LSB_JOBID": "7", "LSB_DJOB_RANKFILE": "/nowhere", "JSM_NAMESPACE_LOCAL_RANK": "0", "JSM_NAMESPACE_SIZE": "1"}
LEFT = {
    "allocation of eight tasks": SLURM | {"SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "8"},
    "allocation without tasks per node": SLURM | {"SLURM_NTASKS": "4"},
    "torchrun": TORCHRUN,
    "world size": {"WORLD_SIZE": "4"},
    "rank": {"RANK": "1"},
    "local rank": {"LOCAL_RANK": "1"},
    "node rank": {"NODE_RANK": "1"},
    "lsf": LSF,
}
DDP = ("--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the environment and Lightning's rank as they were: the command changes both."""
    for name in list(os.environ):
        monkeypatch.setenv(name, os.environ[name])
    monkeypatch.setattr(rank_zero_only, "rank", 0)


def leave(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Set variables as a shell has them that starts the command, and the rank that Lightning then reads."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    rank = next((variables[name] for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if name in variables), "0")
    monkeypatch.setattr(rank_zero_only, "rank", int(rank))


@pytest.mark.parametrize("left", LEFT)
def test_variables_that_a_launcher_left_change_nothing(
    left: str, run_cli: RunCLI, coco_folder: Coco, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(LEFT[left], monkeypatch)
    ran = run_cli("predict", *coco_folder.data, "--data.limit", "2", "--output_dir", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert "2 images and metadata.json" in ran.err


def test_validate_prints_its_numbers_whatever_rank_the_shell_names(
    run_cli: RunCLI, coco_folder: Coco, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave({"RANK": "1", "LOCAL_RANK": "1"}, monkeypatch)
    ran = run_cli("validate", *coco_folder.data)
    assert ran.code == 0, ran.err
    assert " AP50 " in ran.out


@pytest.mark.parametrize(
    "variables",
    [
        SLURM | {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"},
        {"MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": "0"},
        {"MASTER_ADDR": "127.0.0.1", "RANK": "1", "LOCAL_RANK": "1"},
    ],
)
def test_two_ranks_without_a_launcher_are_launched_here(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(variables, monkeypatch)
    forget_stale_launchers()
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False)
    environment = trainer.strategy.cluster_environment
    assert not environment.creates_processes_externally
    assert environment.local_rank() == 0


def test_nodes_may_be_started_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    leave({"MASTER_ADDR": "127.0.0.1", "NODE_RANK": "1"}, monkeypatch)
    forget_stale_launchers()
    trainer = Trainer(
        accelerator="cpu", devices=2, num_nodes=2, strategy="ddp", logger=False, enable_checkpointing=False
    )
    assert trainer.node_rank == 1


@pytest.mark.parametrize(
    ("variables", "ranks"),
    [
        (TORCHRUN | {"WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "1"}, 4),
        (TORCHRUN | {"WORLD_SIZE": "4"}, 4),  # Kubeflow, or by hand
        (SLURM | {"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}, 2),
        (SLURM | {"SLURM_NTASKS": "2", "SLURM_STEP_ID": str(0xFFFFFFFA)}, None),  # the shell of salloc
        ({}, None),
    ],
)
def test_a_launcher_that_is_there_counts(
    variables: dict[str, str], ranks: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(variables, monkeypatch)
    forget_stale_launchers()
    assert launched_ranks() == ranks


def test_a_launcher_of_other_ranks_than_the_trainers_is_refused(
    run_cli: RunCLI, coco_folder: Coco, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(TORCHRUN | {"WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "1"}, monkeypatch)
    ran = run_cli("predict", *coco_folder.data, "--trainer.devices", "1", "--output_dir", tmp_path / "out")
    assert ran.code == 1
    assert "A launcher has started 4 processes" in ran.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "variables",
    [
        SLURM | {"SLURM_NTASKS": "8", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "3"},
        TORCHRUN | {"WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": "2"},
        {"WORLD_SIZE": "4"},
    ],
)
def test_a_call_from_python_is_one_process_under_any_launcher(
    variables: dict[str, str], coco_folder: Coco, tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(variables, monkeypatch)
    for output_dir in (None, tmp_path / "out"):
        sides = {"short_side": 64, "long_side": 128}
        found = extract(coco_folder.images, weights=tiny_weights, output_dir=output_dir, limit=2, **sides)
        assert list(found) == [1, 4]


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook", "fsdp"])
@pytest.mark.parametrize("verb", ["predict", "validate"])
def test_strategies_whose_ranks_do_not_run_the_command_are_refused(
    verb: str, strategy: str, run_cli: RunCLI, coco_folder: Coco
) -> None:
    ran = run_cli(verb, *coco_folder.data, *DDP, strategy)
    assert ran.code == 1
    assert ran.err.count("Error: ") == 1
    assert "strategy" in ran.err
    if strategy != "fsdp":  # Lightning itself refuses it without a GPU
        assert "Use trainer.strategy ddp" in ran.err


def test_more_processes_than_the_cores_can_bear_are_refused(run_cli: RunCLI, coco_folder: Coco) -> None:
    ran = run_cli("predict", *coco_folder.data, *DDP, "ddp", "--trainer.devices", "99")
    assert ran.code == 1
    assert f"at most {2 * available_cores()}" in ran.err


def test_more_ranks_than_cores_are_warned_of(run_cli: RunCLI, coco_folder: Coco, tmp_path: Path) -> None:
    ranks = str(2 * available_cores())
    argv = ("--output_dir", tmp_path / "out", "--dry_run", *DDP, "ddp", "--trainer.devices", ranks)
    ran = run_cli("predict", *coco_folder.data, *argv)
    assert ran.code == 0, ran.err
    assert f"Warning: {ranks} ranks share {available_cores()} core" in ran.err
    assert "Warning" not in run_cli("predict", *coco_folder.data, "--dry_run").err


@pytest.mark.parametrize(
    "option",
    [
        ("--trainer.enable_progress_bar", "false"),
        ("--trainer.barebones", "true"),
        ("--trainer.callbacks", "RichProgressBar"),
        ("--trainer.callbacks", "Timer"),
    ],
)
def test_the_users_own_choice_of_a_progress_bar(
    option: tuple[str, str], run_cli: RunCLI, coco_folder: Coco, tmp_path: Path
) -> None:
    argv = ("--data.limit", "2", "--output_dir", tmp_path / "out", *option)
    ran = run_cli("predict", *coco_folder.data, *argv)
    assert ran.code == 0, ran.err
    assert ("Extracting: " in ran.err) == (option[1] == "Timer")
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_flags_override_a_file_wherever_they_stand(run_cli: RunCLI, coco_folder: Coco, tmp_path: Path) -> None:
    config = tmp_path / "job.yaml"
    config.write_text("data: {limit: 3}\nextract_type: encoder\n")
    before = ("--data.limit", "1", "--extract_type", "backbone", "--output_dir", tmp_path / "out")
    ran = run_cli("predict", *before, f"--config={config}", *coco_folder.data)
    assert ran.code == 0, ran.err
    metadata = json.loads((tmp_path / "out" / "metadata.json").read_text())
    assert (metadata["num_images"], metadata["extract_type"]) == (1, "backbone")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.distributed.DistBackendError("NCCL error in: x.cpp, remote process exited"), "Another rank ended"),
        (RuntimeError("[gloo/transport] Connection closed by peer"), "Another rank ended"),
        (RuntimeError("unable to allocate shared memory(shm) for file </torch_1>"), "--shm-size"),
        (RuntimeError("unable to open shared memory object: Read-only file system"), "data.num_workers to 0"),
    ],
)
def test_lost_processes_end_in_one_message(
    error: Exception,
    said: str,
    run_cli: RunCLI,
    coco_folder: Coco,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(Trainer, "predict", fail)
    ran = run_cli("predict", *coco_folder.data, "--output_dir", tmp_path / "out")
    assert ran.code == 1
    assert ran.err.count("Error: ") == 1
    assert said in ran.err


def test_too_little_shared_memory_is_noticed_before_the_start(
    run_cli: RunCLI, coco_folder: Coco, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "free_shared_memory", lambda: 100_000)
    argv = ("--data.batch_size", "8", "--output_dir", tmp_path / "out")
    ran = run_cli("predict", *coco_folder.data, *argv, "--data.num_workers", "8")
    assert ran.code == 1
    assert "docker run --shm-size" in ran.err
    assert "Use at most 0" in ran.err
    assert not (tmp_path / "out").exists()


def test_a_worker_that_finds_no_shared_memory_ends_the_run(
    run_cli: RunCLI, coco_folder: Coco, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    monkeypatch.delitem(sys.modules, "lance", raising=False)  # With it workers are spawned, and know of no patch.
    argv = ("--data.num_workers", "1", "--output_dir", tmp_path / "out")
    ran = run_cli("predict", *coco_folder.data, *argv)
    assert ran.code == 1
    assert "too little shared memory" in ran.err
    assert not (tmp_path / "out" / "metadata.json").exists()
