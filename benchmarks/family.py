"""Other detectors beside transformers' eager networks, in one run: random weights, default configurations.

python benchmarks/family.py --batch_sizes 1 4
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial

import torch
import transformers

from detr_lightning import DETRExtractor

MODELS = {
    "RT-DETRv2-R50": ("RTDetrV2", "RTDetr", 640),
    "RF-DETR": ("RfDetr", "RfDetr", 560),
    "D-FINE": ("DFine", "RTDetr", 640),
}
"""The names of transformers' classes, those of the processor's, and the side of the images."""

KEYS = ["decoder_output", "query_embeddings", "encoder_output", "pred_logits", "pred_boxes"]


def main() -> None:
    """Print a row per model and batch size: medians of turns that alternate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    options = parser.parse_args()
    print("| model | batch | transformers, ms per image | ours, ms per image | times as fast |\n|---|---|---|---|---|")
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            theirs = save(name, folder)
            ours = DETRExtractor(folder, keys=KEYS).eval()
        for batch_size in options.batch_sizes:
            side = MODELS[name][2]
            pixels = torch.rand(batch_size, 3, side, side, generator=torch.Generator().manual_seed(0))
            slow, fast = alternate(
                [partial(theirs, pixel_values=pixels), partial(ours, pixels)], options.repeats, batch_size
            )
            print(f"| {name} | {batch_size} | {slow:.0f} | {fast:.0f} | {slow / fast:.2f} |", flush=True)


@torch.inference_mode()
def alternate(contestants: list[Callable[[], object]], repeats: int, batch_size: int) -> list[float]:
    """Return the median of each contestant in milliseconds per image, after one turn that warms up."""
    seconds: list[list[float]] = [[] for _ in contestants]
    for turn in range(repeats + 1):
        for contestant, times in zip(contestants, seconds, strict=True):
            began = time.perf_counter()
            contestant()
            if turn:
                times.append(time.perf_counter() - began)
    return [1e3 * statistics.median(times) / batch_size for times in seconds]


def save(name: str, folder: str) -> torch.nn.Module:
    """Make a model with random weights, save it with its processor, and return it."""
    torch.manual_seed(0)
    prefix, processor, side = MODELS[name]
    config = getattr(transformers, f"{prefix}Config")()
    model: torch.nn.Module = getattr(transformers, f"{prefix}ForObjectDetection")(config).eval()
    model.save_pretrained(folder)
    getattr(transformers, f"{processor}ImageProcessor")(size={"height": side, "width": side}).save_pretrained(folder)
    return model


if __name__ == "__main__":
    main()
