"""The demo end to end: a trained model says more than a random one about preprocessing, labels and boxes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from places import ROOT
from ran import RunCLI

from detr_lightning.store.verify import verify

# Well below what assets/demo/README.md states, and far above what any mistake in pixels, labels or boxes leaves.
LEAST_AP50 = 0.9


def numbers(text: str) -> dict[str, float]:
    rows = [line.split() for line in text.replace("│", " ").splitlines()]
    return {row[0]: float(row[1]) for row in rows if len(row) == 2 and row[0].startswith("A")}


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    monkeypatch.chdir(ROOT)
    weights = ROOT / "assets" / "demo" / "detr_demo.pth"
    return "--config", "configs/demo.yaml", "--model.weights", str(weights)


def test_predict_leaves_whole_and_right_files(demo: tuple[str, ...], run_cli: RunCLI, tmp_path: Path) -> None:
    ran = run_cli("predict", *demo, "--output_dir", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert len(list((tmp_path / "out").iterdir())) == 25
    assert verify(tmp_path / "out") == []
    metadata = json.loads((tmp_path / "out" / "metadata.json").read_text())
    assert metadata["categories"]["8"] == "star"


def test_the_model_finds_what_is_there(demo: tuple[str, ...], run_cli: RunCLI) -> None:
    ran = run_cli("validate", *demo)
    assert ran.code == 0, ran.err
    assert numbers(ran.out)["AP50"] > LEAST_AP50


@pytest.mark.parametrize("setting", [("--data.short_side", "48", "--data.long_side", "80"), ("--model.nheads", "4")])
def test_wrong_preprocessing_or_heads_would_show(
    setting: tuple[str, ...], demo: tuple[str, ...], run_cli: RunCLI
) -> None:
    ran = run_cli("validate", *demo, *setting)
    assert ran.code == 0, ran.err
    assert numbers(ran.out)["AP50"] < LEAST_AP50


@pytest.mark.endurance
def test_several_devices_count_each_image_once(demo: tuple[str, ...], run_cli: RunCLI) -> None:
    one = numbers(run_cli("validate", *demo).out)
    argv = ["validate", *demo, "--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), *argv], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    two = numbers(done.stdout)
    assert len(two) == 12
    assert two == pytest.approx(one, abs=0.002)


def test_the_checkpoint_is_plain_and_small() -> None:
    path = ROOT / "assets" / "demo" / "detr_demo.pth"
    assert path.stat().st_size < 14e6
    state = torch.load(path)["model"]
    assert all(tensor.dtype == torch.float16 for tensor in state.values())
