"""One file per image against one Lance table, in one run: writing, opening, stacking, random reads, bytes.

    python benchmarks/layouts.py --images 1000

No model runs: the tensors are random, in the shapes of DETR-R50 on a 640x480 image.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from detr_lightning import EmbeddingStore
from detr_lightning.extraction.run import ExtractionRun
from detr_lightning.extraction.table_run import TableRun
from detr_lightning.format.entries import ImageEntry
from detr_lightning.format.identity import ModelRecord, RunSettings
from detr_lightning.format.keys import QUERY_INDEX, FeatureSizes, ModelShape, shape_of
from detr_lightning.format.schema import RunRecord

SHAPE = ModelShape(
    feature_channels=2048, hidden_dim=256, encoder_layers=6, decoder_layers=6, num_queries=100, num_logits=92
)
FEATURES = FeatureSizes.single((25, 34))
KEPT = 10
"""Queries per image where only some are kept, as for a trained DETR and `writer.min_score: 0.5`."""

JOBS = {
    "decoder": ("decoder_output", "query_embeddings", "encoder_output", "pred_logits", "pred_boxes"),
    "objects": ("query_embeddings", "pred_logits", "pred_boxes", QUERY_INDEX),
}


def main() -> None:
    """Print a table per job."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print("| job | | files | table | files / table |\n|---|---|---|---|---|")
    for job, keys in JOBS.items():
        measured = [measure(job, keys, options.images, repeat) for repeat in range(options.repeats)]
        for name in measured[0]:
            files, table = (statistics.median(one[name][side] for one in measured) for side in (0, 1))
            print(f"| {job} | {name} | {files:.3g} | {table:.3g} | {files / table:.2f} |", flush=True)


def measure(job: str, keys: Sequence[str], images: int, seed: int) -> dict[str, tuple[float, float]]:
    """Return each figure for files and for a table."""
    generator = torch.Generator().manual_seed(seed)
    kept = KEPT if job == "objects" else None
    tensors = {
        key: torch.arange(KEPT)
        if key == QUERY_INDEX
        else torch.rand(shape_of(key, SHAPE, FEATURES, kept), generator=generator)
        for key in keys
    }
    settings = RunSettings(
        model=ModelRecord(weights="random", sha256="0" * 64, architecture=vars(SHAPE)),
        keys=tuple(keys),
        dtype="float32",
        preprocessing={},
        batching="exact",
        precision="32-true",
        min_score=None if kept is None else 0.5,
    )
    record = RunRecord(extract_type="decoder", settings=settings)
    entries = [ImageEntry(number, f"{number}.jpg", 640, 480, (800, 1066)) for number in range(images)]
    with tempfile.TemporaryDirectory() as folder:
        files = ExtractionRun(Path(folder, "files"), record, entries)
        table = TableRun(str(Path(folder, "table")), record, entries, features=FEATURES)
        figures = [write(files, tensors), write(table, tensors)]
        for name, figure in zip(("files", "table"), figures, strict=True):
            path = Path(folder, name)
            figure["bytes, MB"] = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e6
            figure["open, s"] = seconds(lambda path=path: EmbeddingStore(path))
            store = EmbeddingStore(path)
            figure["all query_embeddings, s"] = seconds(lambda store=store: store.rows("query_embeddings"))
            chosen = random.Random(seed).sample(range(images), min(images, 200))
            figure["one image at random, ms"] = 1e3 / len(chosen) * seconds(lambda s=store, c=chosen: [s[i] for i in c])
    return {name: (figures[0][name], figures[1][name]) for name in figures[0]}


def write(run: ExtractionRun | TableRun, tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    """Write all images; return the seconds, and those after the last image."""
    began = time.perf_counter()
    run.inspect()
    run.begin()
    run.join(0)
    for image_id in run.images:
        run.save(image_id, tensors, FEATURES)
    run.leave(done=True)
    saved = time.perf_counter()
    run.finish(1)
    return {"write, images/s": len(run.images) / (saved - began), "finish, s": time.perf_counter() - saved}


def seconds(function: Callable[[], object]) -> float:
    """Return how long a call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
