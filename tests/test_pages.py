"""The README and docs/: their snippets run on the demo's output, their links lead somewhere, their sizes are right."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from pages import blocks
from places import ROOT

from detr_lightning.command.main import main
from detr_lightning.format.keys import resolve_keys

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SNIPPETS = [path for path in PAGES if blocks(path, "python")]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder after `predict --config demo`."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["detr-lightning", "predict", "--config", "demo"])
        assert main() == 0
    return folder


@pytest.fixture
def demo_folder(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: a clone's after `predict --config demo`, for one page alone."""
    shutil.copytree(finished / "demo_output", tmp_path / "demo_output")
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore:.*SwigPy:DeprecationWarning", "ignore:.*swigvarlink:DeprecationWarning")  # FAISS's
@pytest.mark.parametrize("path", SNIPPETS, ids=name)
@pytest.mark.usefixtures("demo_folder")
def test_snippets_run_one_after_another(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["python"])
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks(path, "python"):
        exec(compile(block, name(path), "exec"), names)


@pytest.mark.usefixtures("demo_folder")
def test_the_verbs_of_the_readme_work(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for block in blocks(ROOT / "README.md", "bash") for line in block.splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("detr-lightning ")]
    assert {verb for _, verb, *_ in commands} >= {"summary", "verify", "objects", "evaluate", "export", "validate"}
    for command in commands:
        monkeypatch.setattr("sys.argv", command)
        assert main() == 0, capsys.readouterr().err


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_lead_to_files(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text)]
    local = [link for link in links if link and "://" not in link]
    assert [link for link in local if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("page", ["README.md", "README.ko.md", "docs/output-format.md"])
def test_sizes_are_those_of_the_shapes(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    in_table, in_text = r"^\| `(\w+)`[^|]*\|.*?\| (\d\.\d\d) MB", r"`(\w+)`\s+takes\s+(\d\.\d\d) MB"
    sizes = re.findall(in_table, text, re.MULTILINE) or re.findall(in_text, text)
    assert [kind for kind, _ in sizes] == ["decoder", "all", "encoder", "backbone"]
    floats = {
        "backbone_features": 2048 * 25 * 34,
        "encoder_output": 850 * 256,
        "decoder_output": 6 * 100 * 256,
        "query_embeddings": 100 * 256,
        "pred_logits": 100 * 92,
        "pred_boxes": 100 * 4,
    }
    for kind, megabytes in sizes:
        assert float(megabytes) == pytest.approx(4e-6 * sum(floats[key] for key in resolve_keys(kind)), abs=0.005)
