"""Speed on a GPU: the model alone against its peers, the whole job, and the limits of the machine around the GPU.

    python benchmarks/gpu.py                       everything
    python benchmarks/gpu.py model family          parts of it

Everything runs in one process, one after the other. A few hundred images are made here and read repeatedly from memory.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import os
import shutil
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contestants import Ours, pixels_of_one_image
from family import KEYS, save
from peers import HuggingFace
from run import CONSOLE, machine, make_images

from detr_lightning import DETRExtractor
from detr_lightning.data.decode import read_image
from detr_lightning.data.records import ImageRecord
from detr_lightning.model.detr import normalise
from detr_lightning.system import allow_tf32

PRECISIONS = {
    "32-true": torch.float32,
    "TF32": torch.float32,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
}
"""What models compute in."""


Rows = list[dict[str, Any]]


def milliseconds(run: Callable[[], Any], turns: int) -> float:
    """Return the median time of a call on the GPU, after three turns to warm up."""
    times = []
    for turn in range(turns + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if turn > 2:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def free() -> None:
    """Free the memory of the last model."""
    gc.collect()
    torch.cuda.empty_cache()


def batches(
    run: Callable[[torch.Tensor], Any], image: torch.Tensor, sizes: Sequence[int], turns: int, **of: Any
) -> Rows:
    """Time a model on batches of one image, repeated."""
    rows = []
    with torch.inference_mode():
        for size in sizes:
            batch = image.expand(size, -1, -1, -1).contiguous(memory_format=torch.channels_last)
            torch.cuda.reset_peak_memory_stats()
            each = milliseconds(partial(run, batch), turns) / size
            rows.append(row(**of, batch=size, ms=each, gb=torch.cuda.max_memory_allocated() / 1e9))
    return rows


def model(options: argparse.Namespace) -> Rows:
    """Time DETR-R50 on 800x1066 images that are already on the GPU, decoder keys, against Hugging Face's."""
    rows: Rows = []
    pixels = pixels_of_one_image()
    for precision, dtype in PRECISIONS.items():
        for compiled in (False, True) if precision == "bf16-true" else (False,):
            ours = DETRExtractor("random", tf32=precision == "TF32", compile=compiled).cuda().to(dtype)
            name = "ours, compiled" if compiled else "ours"
            sizes = [16] if compiled else options.batch_sizes
            rows += batches(ours, pixels, sizes, options.turns, side=name, precision=precision)
            del ours
            free()
        allow_tf32(precision == "TF32")
        peer = HuggingFace(dtype)
        rows += batches(
            peer.forward,
            normalise(pixels),
            options.batch_sizes,
            options.turns,
            side="Hugging Face",
            precision=precision,
        )
        del peer
        free()
    return rows


def family(options: argparse.Namespace) -> Rows:
    """Time RT-DETRv2-R50 against transformers' on 640x640 images that are already on the GPU."""
    import transformers

    rows: Rows = []
    with tempfile.TemporaryDirectory() as folder:
        save("RT-DETRv2-R50", folder)
        for precision, dtype in PRECISIONS.items():
            image = torch.rand(1, 3, 640, 640, device="cuda", dtype=dtype)
            ours = DETRExtractor(folder, keys=KEYS, tf32=precision == "TF32").cuda().to(dtype)
            rows += batches(ours, image, options.batch_sizes, options.turns, side="ours", precision=precision)
            del ours
            free()
            allow_tf32(precision == "TF32")
            peer = transformers.RTDetrV2ForObjectDetection.from_pretrained(folder).eval().cuda().to(dtype)
            rows += batches(peer, image, options.batch_sizes, options.turns, side="transformers", precision=precision)
            del peer
            free()
    return rows


def job(options: argparse.Namespace) -> Rows:
    """Time the whole job from JPEG files to `.pt` files, and measure how busy the GPU is."""
    rows = []
    jobs: list[dict[str, Any]] = [
        {"image_backend": "pil"},
        {},
        {"dtype": "float16"},
        {"dtype": "float16", "batch_size": 32},
        {"dtype": "float16", "output": "memory", "keys": ("query_embeddings", "pred_logits", "pred_boxes")},
    ]
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory, tempfile.TemporaryDirectory() as disk:
        made, folder = Path(memory) / "made", Path(memory) / "images"
        folder.mkdir()
        paths = make_images(made, 64)
        for index in range(options.images):
            os.link(paths[index % len(paths)], folder / f"{index + 1}.jpg")
        for settings in jobs:
            used = {
                "image_backend": "torchvision",
                "batch_size": 16,
                "num_workers": 15,
                "threads": 4,
                "output": "disk",
                **settings,
            }
            output = Path(memory if used.pop("output") == "memory" else disk) / "out"
            keys = used.pop("keys", None)
            ours = Ours("bfloat16", keys=keys and list(keys))
            with Busy() as busy:
                seconds = ours.job(folder, output, **used)
            rate = options.images / seconds
            where = "memory" if output.is_relative_to(memory) else "disk"
            rows.append(row(**used, keys=keys, output=where, images_per_second=rate, gpu_busy=busy.share))
            shutil.rmtree(output)
            del ours
            free()
        few = sorted(folder.iterdir())[:200]
        peer = HuggingFace(torch.bfloat16)
        output = Path(disk) / "theirs"
        output.mkdir()
        start = time.perf_counter()
        with Busy() as busy:
            peer.job(few, output, 16)
        rate = len(few) / (time.perf_counter() - start)
        rows.append(row(side="Hugging Face, batch 16, one worker", images_per_second=rate, gpu_busy=busy.share))
    return rows


def limits(options: argparse.Namespace) -> Rows:
    """Measure the disk, the copies, and decoding on the CPU and on the GPU."""
    from torchvision.io import decode_jpeg, read_file

    rows = []
    content = os.urandom(1_630_000)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)

        def write(index: int) -> None:
            with open(folder / str(index), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())

        for threads in (2, 4, 8):
            with ThreadPoolExecutor(threads) as pool:
                start = time.perf_counter()
                list(pool.map(write, range(400)))
            rows.append(row(disk_files_per_second=400 / (time.perf_counter() - start), threads=threads, megabytes=1.63))
        paths = make_images(folder / "images", 64)
        torch.set_num_threads(1)
        for backend in ("pil", "torchvision"):
            record = ImageRecord(1, "1.jpg", 640, 480)
            read_image(paths[0], record, (800, 1066), backend)
            start = time.perf_counter()
            for _ in range(30):
                read_image(paths[0], record, (800, 1066), backend)
            rows.append(row(read_and_resize=backend, ms=(time.perf_counter() - start) / 30 * 1e3))
        data = [read_file(str(path)) for path in paths]
        with contextlib.suppress(RuntimeError):
            decode_jpeg(data, device="cuda")
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(8):
                decode_jpeg(data, device="cuda")
            torch.cuda.synchronize()
            rows.append(row(decode="GPU, without resizing", images_per_second=512 / (time.perf_counter() - start)))
    host = torch.empty(64 << 20, dtype=torch.uint8, pin_memory=True)
    gpu = host.cuda()
    for name, copy in (("to the GPU", lambda: gpu.copy_(host, True)), ("from the GPU", lambda: host.copy_(gpu, True))):
        rows.append(row(copy=name, gigabytes_per_second=host.numel() / milliseconds(copy, options.turns) / 1e6))
    return rows


class Busy(contextlib.AbstractContextManager["Busy"]):
    """The share of time in which the GPU computes, between its first and its last work, sampled by nvidia-smi."""

    def __enter__(self) -> Busy:
        command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "200"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        samples = [int(line) for line in self._process.communicate()[0].split() if line.isdigit()]
        at_work = [index for index, sample in enumerate(samples) if sample]
        found = samples[at_work[0] : at_work[-1] + 1] if at_work else []
        self.share = statistics.mean(found) / 100 if found else float("nan")


def row(**values: Any) -> dict[str, Any]:
    """Print a row, and return it."""
    CONSOLE.print(
        "  ".join(
            f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()
        )
    )
    return values


PARTS = {"model": model, "family": family, "job": job, "limits": limits}


def main() -> None:
    """Run the chosen parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--turns", type=int, default=10, help="turns per figure of the model, which is their median")
    parser.add_argument("--images", type=int, default=6000, help="images of the whole job")
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        CONSOLE.print("Skipped: this machine has no GPU.")
        return
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    results: dict[str, Any] = {"machine": machine()}
    CONSOLE.print(results["machine"])
    for part in options.parts or PARTS:
        CONSOLE.rule(part)
        results[part] = PARTS[part](options)
        if options.output:
            options.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
