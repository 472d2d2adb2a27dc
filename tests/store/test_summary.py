from __future__ import annotations

import pytest
from store_factory import edit_metadata

from detr_lightning.store import EmbeddingStore
from detr_lightning.store.__main__ import main


def test_the_summary(store: EmbeddingStore, capsys: pytest.CaptureFixture[str]) -> None:
    edit_metadata(store.folder, failed=[{"id": 99, "file_name": "b[a]d.jpg", "reason": "truncated"}])
    assert main(["summary", str(store.folder)]) == 0
    text = capsys.readouterr().out
    for part in ("images", "decoder_output", "[3, 10, 16]", "[80, 16]", "random", "32-true", "b[a]d.jpg: truncated"):
        assert part in text
