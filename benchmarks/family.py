"""Other detectors against transformers' eager networks, in one run: random weights, default configurations.

python benchmarks/family.py --batch_sizes 1 4
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

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


_loaded: list[Callable[[torch.Tensor], object]] = []
"""The model of this process, on a batch of images."""


def main() -> None:
    """Print a row per model and batch size: medians of turns that alternate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    options = parser.parse_args()
    print("| model | batch | transformers, ms per image | ours, ms per image | times as fast |\n|---|---|---|---|---|")
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            save(name, folder)
            # Each in its own process: our process-wide settings, such as kept memory, do not affect theirs.
            spawn = multiprocessing.get_context("spawn")
            pools = [
                stack.enter_context(ProcessPoolExecutor(1, spawn, initializer=make, initargs=(name, folder, ours)))
                for ours in (False, True)
            ]
            for batch_size in options.batch_sizes:
                seconds: list[list[float]] = [[], []]
                for _ in range(options.repeats + 1):
                    for pool, times in zip(pools, seconds, strict=True):
                        times.append(pool.submit(turn, MODELS[name][2], batch_size).result())
                slow, fast = (1e3 * statistics.median(times[1:]) / batch_size for times in seconds)
                print(f"| {name} | {batch_size} | {slow:.0f} | {fast:.0f} | {slow / fast:.2f} |", flush=True)


def make(name: str, folder: str, ours: bool) -> None:
    """Load a model into this process."""
    if ours:
        _loaded.append(DETRExtractor(folder, keys=KEYS).eval())
    else:
        _loaded.append(getattr(transformers, f"{MODELS[name][0]}ForObjectDetection").from_pretrained(folder).eval())


def turn(side: int, batch_size: int) -> float:
    """Return the seconds that this process's model takes for a batch."""
    pixels = torch.rand(batch_size, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        began = time.perf_counter()
        _loaded[0](pixels)
        return time.perf_counter() - began


def save(name: str, folder: str) -> None:
    """Save a model with random weights, and its processor."""
    torch.manual_seed(0)
    prefix, processor, side = MODELS[name]
    config = getattr(transformers, f"{prefix}Config")()
    getattr(transformers, f"{prefix}ForObjectDetection")(config).save_pretrained(folder)
    getattr(transformers, f"{processor}ImageProcessor")(size={"height": side, "width": side}).save_pretrained(folder)


if __name__ == "__main__":
    main()
