"""The notebooks have no outputs and run from the first cell to the last; the README's pictures can be made again."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client import KernelManager
from jupyter_client.manager import start_new_kernel
from nbclient import NotebookClient
from places import ROOT, SHARED

from detr_lightning.shipped import DEMO

sys.path.insert(0, str(ROOT))

from tools import readme_pictures

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def kernel() -> Iterator[KernelManager]:
    """One kernel for all notebooks: starting one, and importing everything in it, takes longer than they do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        manager, client = start_new_kernel(kernel_name="python3")
    client.stop_channels()
    yield manager
    manager.shutdown_kernel(now=True)


def execute(kernel: KernelManager, path: Path, folder: Path, **values: Any) -> nbformat.NotebookNode:
    """Run a notebook in a folder, other values in place of those that its first cell gives to names."""
    notebook = nbformat.read(path, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    first.source = f"%reset -f\n%cd -q {folder}\n{first.source.replace('images=150', 'images=40')}"
    first.source += "".join(f"\n{name} = {value!r}" for name, value in values.items())
    client = NotebookClient(notebook, km=kernel, timeout=300)
    client.execute()
    client.kc.stop_channels()
    return notebook


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_all_are_there() -> None:
    names = ["01_extract_and_explore", "02_retrieval", "03_layerwise", "04_group_analysis"]
    assert [path.stem for path in NOTEBOOKS] == names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert outputs(notebook) == []
    for cell in notebook.cells:
        assert cell.source.strip()
        assert not cell.metadata
        assert cell.get("execution_count") is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_on_the_demo(kernel: KernelManager, path: Path, tmp_path: Path) -> None:
    notebook = execute(kernel, path, tmp_path)
    pictures = [output for output in outputs(notebook) if "image/png" in output.get("data", {})]
    assert pictures
    said = [output.text for output in outputs(notebook) if output.output_type == "stream" and output.name == "stderr"]
    assert said == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_survives_finding_nothing(kernel: KernelManager, path: Path, tmp_path: Path) -> None:
    made = outputs(execute(kernel, path, tmp_path, THRESHOLD=1.0))
    said = "\n".join(str(output.get("text", "") or output.get("data", {}).get("text/plain", "")) for output in made)
    assert re.search(r"No query of (24|40) images scores 1.0 or more; the best is 0.9", said)
    assert re.search(r"^(0 (of \d+ (annotated )?)?objects|'Nothing to show)", said, re.MULTILINE)


@pytest.mark.parametrize("model_type", ["rt_detr_v2", "rf_detr", "table-transformer"])
def test_the_first_runs_with_other_detectors(
    kernel: KernelManager, tmp_path: Path, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "tests" / "model")
    from family_reference import build, save

    weights = save(build(model_type), tmp_path / "weights")
    data = {"images": str(DEMO / "images"), "weights": str(weights), "output_dir": str(tmp_path / "out"), "limit": 6}
    notebook = execute(kernel, NOTEBOOKS[0], tmp_path, DATA=data)
    made = outputs(notebook)
    pictures = [output for output in made if "image/png" in output.get("data", {})]
    said = "".join(output.text for output in made if output.output_type == "stream")
    dense = model_type == "table-transformer"
    assert len(pictures) == 2 + dense
    assert ("there are no weights for every place" in said) != dense


@pytest.mark.skipif(not (SHARED / "golden").is_dir(), reason="../shared, with a sample of COCO, is not there")
def test_runs_on_coco(kernel: KernelManager, tmp_path: Path) -> None:
    data = {
        "images": str(SHARED / "coco" / "val2017"),
        "annotation_file": str(SHARED / "coco" / "annotations" / "instances_val2017.json"),
        "weights": str(SHARED / "golden" / "detr_r18_tiny.pth"),
        "output_dir": str(tmp_path / "out"),
        "limit": 4,
        "short_side": 320,
        "long_side": 533,
    }
    execute(kernel, NOTEBOOKS[0], tmp_path, DATA=data, THRESHOLD=0.0)
    assert len(list((tmp_path / "out").iterdir())) == 5


def test_the_pictures_of_the_readme_are_small_and_can_be_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["readme_pictures.py", "--folder", str(tmp_path), "--images", "40"])
    readme_pictures.main()
    names = {"attention.png", "detections.png", "map.png", "neighbours.png"}
    for folder, made in ((tmp_path, names), (ROOT / "assets/readme", names | {"explorer.png"})):  # Of a browser.
        assert {path.name for path in folder.iterdir()} == made
        assert all(path.stat().st_size < 150_000 for path in folder.iterdir())
