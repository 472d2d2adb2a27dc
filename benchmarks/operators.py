"""Each of the model's own operators against torch's, per instruction set.

    python benchmarks/operators.py                  with all instructions of this processor, and with only AVX2
    python benchmarks/operators.py --dtype bfloat16

Each instruction set has its own process, in which oneDNN, MKL and torch use no others. Both
sides of a row take turns. The shapes are those of DETR-R50 for an image of 800x1066: 850 tokens of 256, 100 queries.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
SETS: dict[str, dict[str, str]] = {"all instructions": {}, "AVX2 alone": AVX2}
"""Instruction sets, each with the environment variables that select it."""

Pair = tuple[Callable[[], Any], Callable[[], Any]]


def pairs(dtype_name: str) -> dict[str, Pair]:
    """Return pairs of functions, our operator and torch's own for the same computation, by its name."""
    import torch
    import torch.nn.functional as F

    from detr_lightning.model.detr import onednn

    dtype = getattr(torch, dtype_name)
    made: dict[str, Pair] = {}

    def linear(rows: int, inputs: int, outputs: int, relu: bool) -> Pair:
        x, weight, bias = (torch.randn(*s, dtype=dtype) for s in ((1, rows, inputs), (outputs, inputs), (outputs,)))

        def plain() -> torch.Tensor:
            y = F.linear(x, weight, bias)
            return y.relu() if relu else y

        return lambda: onednn.linear(x, weight, bias, relu), plain

    for rows in (850, 100):
        for inputs, outputs in ((256, 256), (256, 2048), (2048, 256)):
            made[f"linear, {rows} x {inputs} -> {outputs}"] = linear(rows, inputs, outputs, relu=outputs == 2048)

    def convolution(inputs: int, outputs: int, side: int, height: int, width: int, add: bool) -> Pair:
        x = torch.randn(1, inputs, height, width, dtype=dtype).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(outputs, inputs, side, side, dtype=dtype).contiguous(memory_format=torch.channels_last)
        bias = torch.randn(outputs, dtype=dtype)
        settings = ((1, 1), (side // 2, side // 2), (1, 1))
        packed = onednn.pack(weight, settings, x.shape)
        shortcut = onednn.plain_convolve(x, weight, bias, settings, None, False) if add else None
        return (
            lambda: onednn.convolve(x, packed, bias, settings, shortcut, True),
            lambda: onednn.plain_convolve(x, weight, bias, settings, shortcut, True),
        )

    for stage, (height, width) in enumerate(((200, 267), (100, 134), (50, 67), (25, 34))):
        narrow = 64 * 2**stage
        made[f"stage {stage + 1}, 3x3, ReLU"] = convolution(narrow, narrow, 3, height, width, False)
        made[f"stage {stage + 1}, 1x1, ReLU"] = convolution(4 * narrow, narrow, 1, height, width, False)
        made[f"stage {stage + 1}, 1x1, shortcut, ReLU"] = convolution(narrow, 4 * narrow, 1, height, width, True)
    return made


def measure(dtype: str, runs: int) -> dict[str, Any]:
    """Return the instruction set that torch uses, and the median ms of both functions of each pair."""
    import torch

    rows = {}
    with torch.inference_mode():
        for name, pair in pairs(dtype).items():
            times: tuple[list[float], list[float]] = ([], [])
            for _ in range(runs + 2):
                for run, seconds in zip(pair, times, strict=True):
                    start = time.perf_counter()
                    run()
                    seconds.append(time.perf_counter() - start)
            rows[name] = [statistics.median(seconds[2:]) * 1e3 for seconds in times]
    return {"capability": torch.backends.cpu.get_cpu_capability(), "rows": rows}


def main() -> None:
    """Measure under each instruction set and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--runs", type=int, default=30, help="runs of each side, after two to warm up")
    parser.add_argument("--here", action="store_true", help="measure in this process and print JSON")
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure(options.dtype, options.runs)))
        return
    command = [sys.executable, str(Path(__file__)), "--here", "--dtype", options.dtype, "--runs", str(options.runs)]
    results = {}
    for name, settings in SETS.items():
        done = subprocess.run(command, env={**os.environ, **settings}, check=True, capture_output=True, text=True)
        results[name] = json.loads(done.stdout.splitlines()[-1])
    titles = [f"{name} ({result['capability']})" for name, result in results.items()]
    print("| ms |" + "".join(f" {title}: ours | torch's own | times ours |" for title in titles))
    print("|---|" + "---|---|---|" * len(titles))
    for row in next(iter(results.values()))["rows"]:
        cells = [result["rows"][row] for result in results.values()]
        print(f"| {row} |" + "".join(f" {ours:.2f} | {own:.2f} | {own / ours:.2f} |" for ours, own in cells))


if __name__ == "__main__":
    main()
