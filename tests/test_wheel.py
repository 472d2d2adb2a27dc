"""The wheel alone: its configs and its demo, with no clone beside it."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from places import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the content of the wheel, as pip would unpack it."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(installed: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300
    )


def test_holds_the_configs_and_the_demo_and_no_more(installed: Path) -> None:
    assert {path.name.partition("-")[0] for path in installed.iterdir()} == {"detr_lightning"}
    package = installed / "detr_lightning"
    for folder, pattern in (("configs", "*"), ("assets/demo", "**/*")):
        ours = {path.relative_to(ROOT / folder) for path in (ROOT / folder).glob(pattern)}
        theirs = {path.relative_to(package / folder) for path in (package / folder).glob(pattern)}
        assert theirs == ours
    assert (package / "py.typed").exists()


def test_finds_its_own_files(installed: Path, tmp_path: Path) -> None:
    code = "from detr_lightning import shipped; print(shipped.HOME); print(shipped.demo_file('assets/demo/images'))"
    done = run(installed, tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    package = installed / "detr_lightning"
    assert done.stdout.split() == [str(package), str(package / "assets/demo/images")]


@pytest.mark.endurance
def test_the_demo_runs_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    done = run(installed, tmp_path, "-m", "detr_lightning", "predict", "--config", "demo")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "demo_output").iterdir())) == 25
    code = "from detr_lightning import extract; from detr_lightning.demo import demo; print(len(extract(**demo(3))))"
    done = run(installed, tmp_path, "-c", code)
    assert (done.returncode, done.stdout.split()) == (0, ["3"]), done.stderr
