"""The extraction that the tests of tables share, and its annotations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from store_factory import annotations_of, make_store

from detr_lightning.store import EmbeddingStore


@pytest.fixture
def content() -> dict[str, Any]:
    return annotations_of()


@pytest.fixture
def store(tmp_path: Path, content: dict[str, Any]) -> EmbeddingStore:
    return make_store(tmp_path / "store", content)


@pytest.fixture
def annotation_file(tmp_path: Path, content: dict[str, Any]) -> Path:
    """The annotations that the store was made of, as a file."""
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    return path
