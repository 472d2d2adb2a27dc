"""The error of each tensor under each setting, against float32 on the CPU, batch size 1 and official pixels.

    python benchmarks/accuracy.py FOLDER_OF_IMAGES --weights detr_resnet50

Prints for each tensor the largest error of any image, norm(a - b) / norm(b), and for `query_embeddings` the smallest
cosine similarity of any query. Settings that the device lacks are left out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from detr_lightning import extract
from detr_lightning.format.keys import EXTRACT_TYPES

SETTINGS: dict[str, dict[str, Any]] = {
    "trainer.accelerator auto": {},
    "batch size 2": {"batch_size": 2},
    "batch size 8": {"batch_size": 8},
    "batch size 16": {"batch_size": 16},
    "padded batches of 2": {"batching": "padded", "batch_size": 2},
    "padded batches of 8": {"batching": "padded", "batch_size": 8},
    "image_backend torchvision": {"image_backend": "torchvision"},
    "writer.dtype float16": {"dtype": "float16"},
    "bf16-true": {"precision": "bf16-true"},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "16-true": {"precision": "16-true"},
    "16-mixed": {"precision": "16-mixed"},
    "model.compile": {"model": {"compile": True}},
    "model.tf32": {"model": {"tf32": True}},
}
GPU_ONLY = ("16-mixed", "model.tf32")
ACCELERATOR_ONLY = ("trainer.accelerator auto",)
KEYS = EXTRACT_TYPES["all"]


def compare(got: dict[int, dict[str, torch.Tensor]], wanted: dict[int, dict[str, torch.Tensor]]) -> dict[str, float]:
    """Return the largest error of each tensor, and the smallest cosine similarity of the query embeddings."""
    errors = dict.fromkeys((*KEYS, "cosine"), 0.0)
    errors["cosine"] = 1.0
    for image_id, tensors in wanted.items():
        for key, b in tensors.items():
            a = got[image_id][key]
            if a.shape == b.shape:  # padding may add a row or a column to a feature map
                errors[key] = max(errors[key], float((a.double() - b.double()).norm() / b.double().norm()))
        a, b = (t["query_embeddings"].double() for t in (got[image_id], tensors))
        errors["cosine"] = min(errors["cosine"], float(torch.cosine_similarity(a, b).min()))
    return errors


def main() -> None:
    """Extract with each setting and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image_dir")
    parser.add_argument("--weights", default="detr_resnet50")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    options = parser.parse_args()
    common: dict[str, Any] = {"weights": options.weights, "extract_type": "all", "progress": False}
    wanted = extract(options.image_dir, **common, batch_size=1, limit=options.limit, accelerator="cpu")
    results = {}
    table = Table(title=f"{options.weights}, {len(wanted)} images", title_justify="left")
    table.add_column("setting")
    for key in (*KEYS, "cosine"):
        table.add_column(key, justify="right")
    for name in options.settings:
        if name in GPU_ONLY and not torch.cuda.is_available():
            continue
        if name in ACCELERATOR_ONLY and not torch.accelerator.is_available():
            continue
        settings = {"batch_size": 1, **SETTINGS[name]}
        if "model" in settings:
            settings = {**settings, "model": dict(settings["model"])}
        got = extract(options.image_dir, **common, limit=options.limit, **settings)
        results[name] = compare(got, wanted)
        cells = [f"{results[name][key]:.1e}" for key in KEYS]
        table.add_row(name, *cells, f"{results[name]['cosine']:.6f}")
    Console(width=160).print(table)
    if options.output:
        options.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
