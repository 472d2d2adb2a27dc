"""Which part of the package knows which, and what importing it costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import detr_lightning

PACKAGE = Path(detr_lightning.__file__).parent

ORDER = (
    "errors",
    "shipped",
    "demo",
    "launch",
    "system",
    "parallel",
    "gpu",
    "ranks",
    "format",
    "model",
    "data",
    "detections",
    "batch",
    "extractor",
    "extraction",
    "store",
    "analysis",
    "progress",
    "job",
    "api",
    "query",
    "command",
)
"""The rooms: each imports only those that stand before it, and itself without a circle."""

SEPARATE = (("format", "system"), ("format", "parallel"), ("model", "data"), ("extraction", "store"))
"""Rooms that never import each other, wherever they stand."""

IMPORT_LIGHTNING = (
    "api",
    "command",
    "data.datamodule",
    "extraction.layouts",
    "extraction.memory",
    "extraction.provenance",
    "extraction.writer",
    "extractor",
    "job",
    "progress",
    "ranks",
)
"""The modules that may import Lightning."""

# The re-exports of the package, and the alias `python -m detr_lightning.store`.
EXEMPT = ("", "__main__", "store.__main__")


def modules() -> dict[str, Path]:
    """Return every module of the package by its dotted name within the package."""
    names = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


MODULES = modules()


def imported(module: str) -> set[str]:
    """Return all names that a module imports: in functions and under TYPE_CHECKING too, relative ones made absolute."""
    names = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own(module: str) -> set[str]:
    """Return the modules of the package that a module imports."""
    found = set()
    for name in imported(module):
        if name.split(".")[0] == "detr_lightning":
            inside = name.partition(".")[2]
            while inside not in MODULES:
                inside = inside.rpartition(".")[0]
            found.add(inside)
    return found - {module, ""}


def room(module: str) -> str:
    return module.split(".", maxsplit=1)[0]


RULED = sorted(MODULES.keys() - set(EXEMPT))


def test_every_module_has_a_room() -> None:
    assert {room(module) for module in RULED} <= set(ORDER)


@pytest.mark.parametrize("module", RULED)
def test_imports_point_one_way(module: str) -> None:
    place = ORDER.index(room(module))
    below = {(module, other) for other in own(module) if ORDER.index(room(other)) > place}
    assert below == set()


@pytest.mark.parametrize("pair", SEPARATE, ids=" and ".join)
def test_rooms_that_never_import_each_other(pair: tuple[str, str]) -> None:
    for one, other in (pair, pair[::-1]):
        crossing = {m: own(m) for m in RULED if room(m) == one and any(room(o) == other for o in own(m))}
        assert crossing == {}


def test_no_circle() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " imports ".join((*path[path.index(module) :], module))
        if module not in done:
            for other in sorted(own(module)):
                visit(other, (*path, module))
            done.add(module)

    for module in RULED:
        visit(module, ())


def test_only_the_modules_that_run_lightning_import_it() -> None:
    importing = {module for module in RULED if any(room(name) == "lightning" for name in imported(module))}
    allowed = IMPORT_LIGHTNING
    assert {module for module in importing if module not in allowed and room(module) not in allowed} == set()


def test_reading_a_folder_imports_only_what_it_needs() -> None:
    code = """
import sys
from detr_lightning import EmbeddingStore
from detr_lightning.format import state
from detr_lightning.store import export, verify
unwanted = {"lightning", "torchvision", "torchmetrics", "transformers", "pandas", "pyarrow", "matplotlib", "sklearn"}
sys.exit(" ".join(unwanted & sys.modules.keys()) or None)
"""
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
