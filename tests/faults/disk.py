"""What a run does to the disk, without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from detr_lightning.extraction.run import ExtractionRun

HEADER: dict[str, Any] = {
    "extract_type": "decoder",
    "embedding_keys": ["query_embeddings"],
    "model": {"weights": "tiny", "sha256": "0", "architecture": {}},
    "preprocessing": {},
    "batching": "exact",
    "dtype": "float32",
    "precision": "32-true",
}


def extract(folder: Path, ids: list[int], if_exists: str = "resume") -> ExtractionRun:
    """Plan, write and finish, as the writer does."""
    entries = [{"id": i, "file_name": f"{i}.jpg", "width": 8, "height": 8, "input_size": [8, 8]} for i in ids]
    run = ExtractionRun(folder, HEADER, entries, if_exists=if_exists)
    run.inspect()
    if not run.complete:
        run.begin()
        run.join(0)
        for entry in run.pending:
            run.save(entry["id"], {"query_embeddings": torch.full((3,), float(entry["id"]))}, (1, 1))
        run.leave(done=True)
        run.finish(1)
    return run
