"""What the package promises as a whole: which part knows which, and what importing it costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import detr_lightning

PACKAGE = Path(detr_lightning.__file__).parent
NEEDS_LIGHTNING = {
    "api.py",
    "command/cli.py",
    "command/parser.py",
    "data/datamodule.py",
    "extraction/provenance.py",
    "extraction/writer.py",
    "extractor.py",
    "progress.py",
}
# The parts of the package that each part may import, besides itself. Others join the parts and may import all.
ALLOWED = {
    "errors": set(),
    "system": set(),
    "format": {"errors", "model"},  # model: the type of an architecture
    "model": {"errors", "format"},
    "data": {"errors", "format", "system"},
    "detections": {"errors"},
    "parallel": set(),
    "store": {"errors", "format", "parallel", "detections", "command"},  # command: the alias store/__main__.py
    "analysis": {"errors", "format", "parallel", "data", "detections", "store"},
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_only_the_parts_that_run_lightning_import_it() -> None:
    importing = {
        path.relative_to(PACKAGE).as_posix()
        for path in modules()
        if any(name.split(".")[0] == "lightning" for name in imported(path))
    }
    assert importing == NEEDS_LIGHTNING


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_imports_point_one_way(part: str) -> None:
    for path in modules():
        relative = path.relative_to(PACKAGE)
        if relative.parts[0].removesuffix(".py") != part:
            continue
        others = {name.split(".")[1] for name in imported(path) if name.startswith("detr_lightning.")}
        assert others - {part} <= ALLOWED[part], relative


def test_reading_a_folder_does_not_import_lightning() -> None:
    code = (
        "import sys, detr_lightning; detr_lightning.EmbeddingStore; "
        "sys.exit(' '.join({'lightning', 'torchvision', 'pandas', 'matplotlib'} & sys.modules.keys()) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_public_names_are_those_announced() -> None:
    assert set(detr_lightning.__all__) == {
        "COCODataModule",
        "DETRExtractor",
        "EmbeddingStore",
        "EmbeddingWriter",
        "extract",
    }
    for name in detr_lightning.__all__:
        assert getattr(detr_lightning, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Extractor'"):
        detr_lightning.Extractor  # noqa: B018
