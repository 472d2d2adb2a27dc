"""What a run does to the disk, without a model."""

from __future__ import annotations

from pathlib import Path

import torch

from detr_lightning.extraction.run import ExtractionRun
from detr_lightning.format.entries import ImageEntry
from detr_lightning.format.identity import ModelRecord, RunSettings
from detr_lightning.format.keys import FeatureSizes
from detr_lightning.format.schema import RunRecord

ARCHITECTURE = {
    "block": "basic",
    "hidden_dim": 3,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "num_queries": 1,
    "num_logits": 2,
}
RECORD = RunRecord(
    extract_type="decoder",
    settings=RunSettings(
        model=ModelRecord(weights="tiny", sha256="0", architecture=ARCHITECTURE),
        keys=("query_embeddings",),
        dtype="float32",
        preprocessing={},
        batching="exact",
        precision="32-true",
    ),
)


def extract(folder: Path, ids: list[int], if_exists: str = "resume") -> ExtractionRun:
    """Plan, write and finish, as the writer does."""
    entries = [ImageEntry(i, f"{i}.jpg", width=8, height=8, input_size=(8, 8)) for i in ids]
    run = ExtractionRun(folder, RECORD, entries, if_exists=if_exists)
    run.inspect()
    if not run.complete:
        run.begin()
        run.join(0)
        for entry in run.pending:
            tensors = {"query_embeddings": torch.full((1, 3), float(entry.image_id))}
            run.save(entry.image_id, tensors, FeatureSizes.single((1, 1)))
        run.leave(done=True)
        run.finish(1)
    return run
