from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hugging_face_reference import REFERENCES, hugging_face_detr, scrambled


class Reference(NamedTuple):
    """Hugging Face's model, and the folder where it saved itself."""

    model: Any
    folder: Path


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    """Build one of `REFERENCES`, once."""
    built: dict[str, Reference] = {}

    def get(name: str) -> Reference:
        if name not in built:
            model = scrambled(hugging_face_detr(**REFERENCES[name]))
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            built[name] = Reference(model, folder)
        return built[name]

    return get
