"""The extraction that the tests of reading share."""

from __future__ import annotations

from pathlib import Path

import pytest
from store_factory import make_store

from detr_lightning.format.keys import KEYS
from detr_lightning.store import EmbeddingStore


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    return make_store(tmp_path / "store", keys=KEYS)
