"""Speed against the peers, in one run, side by side.

    python benchmarks/run.py                       the model alone, the whole job, the stages, the machine's limit
    python benchmarks/run.py --official CHECKOUT   with the official code (a checkout of facebookresearch/detr)
    python benchmarks/run.py scaling               images/s and memory against images, batch size, workers, threads
    python benchmarks/run.py compile               torch.compile against the default
    python benchmarks/run.py gpu                   batch sizes and precisions on a GPU; skips where there is none

Contestants take turns, so that a machine whose speed drifts is as unfair to one as to another. Medians are printed and,
with `--output`, written as JSON. The images are made here: photographs of 640x480 have the same cost.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent))
from peers import HuggingFace, Official, Peer

from detr_lightning import COCODataModule, DETRExtractor, EmbeddingWriter
from detr_lightning.data.files import locate
from detr_lightning.data.images import ImageRecord
from detr_lightning.data.transforms import read_pixels, resized_size
from detr_lightning.embeddings import EXTRACT_TYPES
from detr_lightning.model import DETR, fold, normalise
from detr_lightning.progress import calm
from detr_lightning.store.layout import save_tensors

CONSOLE = Console(width=120)
KEYS = EXTRACT_TYPES["decoder"]
PRECISIONS = {"float32": ("32-true", torch.float32), "bfloat16": ("bf16-true", torch.bfloat16)}


def median_times(contestants: dict[str, Callable[[], Any]], runs: int) -> dict[str, float]:
    """Run everything in turn, once to warm up and `runs` times for the record; return median seconds."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(runs + 1):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def make_images(folder: Path, number: int, sizes: list[tuple[int, int]] | None = None) -> list[Path]:
    """Write JPEG files with about the detail of photographs, 640x480 unless `sizes` (width, height) are given."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index in range(number):
        size = sizes[index % len(sizes)] if sizes else (640, 480)
        coarse = Image.fromarray(generator.integers(0, 256, (60, 80, 3), dtype=np.uint8)).resize(
            size, Image.Resampling.BICUBIC
        )
        grain = generator.normal(0, 8, (size[1], size[0], 3))
        pixels = (np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8)
        paths.append(folder / f"{index + 1}.jpg")
        Image.fromarray(pixels).save(paths[-1], quality=90)
    return paths


class Clock(Callback):
    """Times a run from its first batch to its metadata, so that start-up is left out."""

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Start."""
        self.start = time.perf_counter()

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop."""
        self.seconds = time.perf_counter() - self.start


def our_job(folder: Path, model: DETRExtractor, precision: str = "32-true", **settings: Any) -> float:
    """Run the whole job on a folder of images; return seconds without start-up."""
    writer_settings = {key: settings.pop(key) for key in ("dtype", "threads") if key in settings}
    clock = Clock()
    with tempfile.TemporaryDirectory() as output, calm():
        # Callbacks end in order: the writer has written all when the clock stops.
        writer = EmbeddingWriter(str(Path(output) / "out"), **writer_settings)
        trainer = Trainer(
            devices=1,
            precision=precision,  # type: ignore[arg-type]
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            callbacks=[writer, clock],
        )
        trainer.predict(model, COCODataModule(str(folder), **settings), return_predictions=False)
    return clock.seconds


def make_peers(options: argparse.Namespace, batch_size: int, dtype: torch.dtype) -> list[Peer]:
    """Return the peers that are to be had."""
    peers: list[Peer] = [HuggingFace(batch_size, dtype)]
    if options.official and dtype == torch.float32:  # its position encoding does not run in bfloat16
        peers.append(Official(options.official, batch_size, dtype))
    return peers


def peak_runs(device: str) -> dict[str, tuple[Callable[[], Any], float]]:
    """Return what asks the most of a machine, one large product and one large convolution, each with its FLOPs."""
    runs: dict[str, tuple[Callable[[], Any], float]] = {}
    for name, (_, dtype) in PRECISIONS.items():
        a = torch.randn(2048, 2048, dtype=dtype, device=device)
        x = torch.randn(1, 256, 200, 266, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)
        w = torch.randn(256, 256, 3, 3, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)
        runs[f"product, {name}"] = (lambda a=a: a @ a), 2.0 * 2048**3
        runs[f"convolution, {name}"] = (lambda x=x, w=w: torch.conv2d(x, w, padding=1)), 2.0 * 200 * 266 * 256 * 256 * 9
    return runs


def model_alone(options: argparse.Namespace) -> dict[str, Any]:
    """Time the model on one 800x1066 image, everything else left out."""
    pixels = torch.randint(0, 256, (1, 3, 800, 1066), dtype=torch.uint8)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pixels = pixels.contiguous(memory_format=torch.channels_last).to(device)
    images = normalise(pixels).contiguous()
    reference = DETR().eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        reference.to(device)(pixels, keys=KEYS)
    flops = counter.get_total_flops()
    contestants: dict[str, Callable[[], Any]] = {}
    for name, (_, dtype) in PRECISIONS.items():
        ours = fold(reference).to(device, dtype)
        contestants[f"ours, {name}"] = lambda ours=ours: ours(pixels, keys=KEYS)
        for peer in make_peers(options, 1, dtype):
            contestants[f"{peer.name}, {name}"] = lambda peer=peer: peer.forward(images)
    peaks = peak_runs(device)
    with torch.inference_mode():
        seconds = median_times(contestants | {name: run for name, (run, _) in peaks.items()}, options.runs)
    reached = {name: work / seconds.pop(name) for name, (_, work) in peaks.items()}
    rates = {name: max(rate for run, rate in reached.items() if run.endswith(f", {name}")) for name in PRECISIONS}
    for name, rate in rates.items():
        seconds[f"machine's limit, {name}"] = flops / rate
    show("The model alone, one 800x1066 image", seconds)
    CONSOLE.print(
        f"{flops / 1e9:.0f} GFLOP an image; best rates here: "
        + ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in rates.items())
    )
    return {"seconds": seconds, "flops": flops, "peak_flops_per_second": rates}


def whole_job(options: argparse.Namespace) -> dict[str, Any]:
    """Time the way from JPEG files to `.pt` files, start-up excluded, an image."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "images"
        paths = make_images(folder, options.images)
        extractor = DETRExtractor("random")
        jobs: dict[str, Callable[[], float]] = {}
        for name, (precision, dtype) in PRECISIONS.items():
            jobs[f"ours, {name}"] = lambda precision=precision: our_job(folder, extractor, precision)
            for batch_size in (1, options.peer_batch_size):
                for peer in make_peers(options, batch_size, dtype):
                    jobs[f"{peer.name}, batch {batch_size}, {name}"] = lambda peer=peer: timed_job(peer, paths)
        times: dict[str, list[float]] = {name: [] for name in jobs}
        for turn in range(options.job_runs + 1):
            for name, job in jobs.items():
                seconds = job() / len(paths)
                if turn or options.job_runs == 1:
                    times[name].append(seconds)
    result = {name: statistics.median(values) for name, values in times.items()}
    show(f"The whole job, {len(paths)} JPEG files of 640x480, seconds an image", result)
    return {"seconds": result}


def timed_job(peer: Peer, paths: list[Path]) -> float:
    """Run a peer's whole job; return seconds."""
    with tempfile.TemporaryDirectory() as output:
        start = time.perf_counter()
        peer.job(paths, Path(output))
        return time.perf_counter() - start


def stages(options: argparse.Namespace) -> dict[str, Any]:
    """Time each stage of an image's way on its own, and how much of a run the model is not running."""
    rows: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "images"
        paths = make_images(folder, options.images)
        record = ImageRecord(1, "1.jpg", 640, 480)
        size = resized_size(record.size)
        path = locate(folder, record)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        share: dict[str, float] = {}
        for name, (precision, dtype) in PRECISIONS.items():
            model = fold(DETR().eval()).to(device, dtype)
            pixels = read_pixels(path, record, size)[None].to(device)
            with torch.inference_mode():
                images = normalise(pixels).to(dtype)
                features = model.backbone[0](images)
                position = model.backbone[1](features)
                tokens = model.input_proj(features).flatten(2).transpose(1, 2)
                memory = model.transformer.encoder(tokens, position)[-1]
                out = model(pixels, keys=KEYS)
                host = {key: value[0].float().cpu().contiguous() for key, value in out.items()}

                def decode() -> None:
                    decoded, _ = model.transformer.decoder(model.query_embed.weight, memory, position, None, False)  # noqa: B023
                    model.predict(decoded[-1])  # noqa: B023

                rows |= {
                    f"{stage}, {name}": seconds
                    for stage, seconds in median_times(
                        {
                            "normalise": lambda: normalise(pixels),  # noqa: B023
                            "backbone": lambda: model.backbone[0](images),  # noqa: B023
                            "encoder": lambda: model.transformer.encoder(tokens, position),  # noqa: B023
                            "decoder and heads": decode,
                            "model in all": lambda: model(pixels, keys=KEYS),  # noqa: B023
                            "device to host": lambda: {key: value.float().cpu() for key, value in out.items()},  # noqa: B023
                        },
                        options.runs,
                    ).items()
                }
            extractor = DETRExtractor("random")
            with torch.inference_mode():
                alternating = []
                for _ in range(options.job_runs + 1):
                    start = time.perf_counter()
                    for _ in paths:
                        model(pixels, keys=KEYS)
                    alone = time.perf_counter() - start
                    alternating.append(1 - alone / our_job(folder, extractor, precision, batch_size=1))
            share[name] = statistics.median(alternating[1:])
        rows |= median_times(
            {
                "read and resize, pil": lambda: read_pixels(path, record, size),
                "read and resize, torchvision": lambda: read_pixels(path, record, size, "torchvision"),
                "write one decoder file": lambda: save_tensors(Path(temporary), 1, host),
            },
            options.runs * 4,
        )
    show("Stages, one image", rows, ratios=False)
    for name, value in share.items():
        CONSOLE.print(f"Share of the whole job in which the model is not running, {name}: {value:.1%}")
    return {"seconds": rows, "model_idle": share}


SCALING = """
import json, resource, sys
sys.path.insert(0, {here!r})
from pathlib import Path
from run import our_job
from detr_lightning import DETRExtractor
model = DETRExtractor({weights!r}, {extract_type!r})
seconds = our_job(Path({folder!r}), model, **json.loads({settings!r}))
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3]))
"""


def measured(
    folder: Path, weights: str = "random", extract_type: str = "decoder", **settings: Any
) -> tuple[float, float]:
    """Run a job in a process of its own; return its seconds and its peak memory in MB."""
    here = str(Path(__file__).parent)
    code = SCALING.format(
        here=here, weights=weights, extract_type=extract_type, folder=str(folder), settings=json.dumps(settings)
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, memory = json.loads(done.stdout.splitlines()[-1])
    return seconds, memory


def scaling(options: argparse.Namespace) -> dict[str, Any]:
    """Show images/s and peak memory against the number of images, batch size, workers and writing threads."""
    demo = str(Path(__file__).parent.parent / "assets" / "demo" / "detr_demo.pth")
    sweeps = {"batch_size": (1, 4, 8, 16, 32), "num_workers": (0, 1, 2, 4), "threads": (1, 2, 4)}
    runs: list[dict[str, Any]] = [
        *({"limit": number} for number in options.numbers),
        *({"limit": 500, name: value} for name, values in sweeps.items() for value in values),
    ]
    runs = [{"weights": demo, "short_side": 128, "long_side": 213, **run} for run in runs]
    runs += [{"limit": 32, "batch_size": batch_size} for batch_size in (1, 2, 4, 8, 16)]
    runs += [{"limit": number, "batch_size": 8, "extract_type": "all"} for number in (16, 32)]
    result = {}
    table = Table(title="Scaling", title_justify="left")
    for column in ("run", "images/s", "peak memory, MB"):
        table.add_column(column, justify="left" if column == "run" else "right")
    with tempfile.TemporaryDirectory() as temporary:
        many, photographs = Path(temporary) / "many", Path(temporary) / "photographs"
        make_images(many, max(*options.numbers, 500), [(192, 144), (144, 192), (160, 160)])
        make_images(photographs, 32)
        for run in runs:
            small = "weights" in run
            seconds, memory = measured(many if small else photographs, **run)
            shown = {key: value for key, value in run.items() if key not in ("weights", "short_side", "long_side")}
            name = ", ".join(
                ["demo model" if small else "DETR-R50", *(f"{key} {value}" for key, value in shown.items())]
            )
            result[name] = {"images_per_second": run["limit"] / seconds, "peak_mb": memory}
            table.add_row(name, f"{run['limit'] / seconds:.2f}", f"{memory:.0f}")
    CONSOLE.print(table)
    return result


def compiled(options: argparse.Namespace) -> dict[str, Any]:
    """Compare `model.compile` with the default on images of many shapes."""
    result = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "mixed"
        sizes = [(640, 480), (640, 427), (480, 640), (640, 426), (500, 375), (427, 640), (640, 360), (612, 612)]
        make_images(folder, options.images, sizes)
        for name, settings in (("default", {}), ("compile", {"compile": True})):
            result[name] = our_job(folder, DETRExtractor("random", **settings)) / options.images
    show(
        f"torch.compile on {options.images} images of {len(sizes)} shapes, seconds an image, compilation included",
        result,
    )
    return result


def gpu(options: argparse.Namespace) -> dict[str, Any]:
    """Show images/s on a GPU for batch sizes and precisions, against Hugging Face, and how busy the GPU is."""
    if not torch.cuda.is_available():
        CONSOLE.print("There is no GPU here: skipped.")
        return {}
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "images"
        paths = make_images(folder, options.images)
        for name, (precision, dtype) in PRECISIONS.items():
            for batch_size in (1, 8, 16, 32):
                for compile_it in (False, True):
                    model = DETRExtractor("random", compile=compile_it)
                    our_job(folder, model, precision, batch_size=batch_size, limit=2 * batch_size)
                    with Busy() as busy:
                        seconds = our_job(folder, model, precision, batch_size=batch_size, image_backend="torchvision")
                    label = f"ours, {name}, batch {batch_size}" + ", compiled" * compile_it
                    result[label] = {"images_per_second": len(paths) / seconds, "gpu_busy": busy.share}
                peer = HuggingFace(batch_size, dtype)
                timed_job(peer, paths[: 2 * batch_size])
                with Busy() as busy:
                    seconds = timed_job(peer, paths)
                label = f"Hugging Face, {name}, batch {batch_size}"
                result[label] = {"images_per_second": len(paths) / seconds, "gpu_busy": busy.share}
    table = Table(
        title=f"GPU: {torch.cuda.get_device_name()}, {len(paths)} JPEG files of 640x480", title_justify="left"
    )
    for column in ("run", "images/s", "GPU busy"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for label, row in result.items():
        table.add_row(label, f"{row['images_per_second']:.1f}", f"{row['gpu_busy']:.0%}")
    CONSOLE.print(table)
    return result


class Busy:
    """The share of time in which the GPU is busy, as nvidia-smi samples it."""

    def __enter__(self) -> Busy:
        command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "200"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        samples = [int(line) for line in self.process.communicate()[0].split() if line.isdigit()]
        self.share = statistics.mean(samples) / 100 if samples else float("nan")


def show(title: str, seconds: dict[str, float], ratios: bool = True) -> None:
    """Print seconds, and how many times as fast ours is in the same precision."""
    table = Table(title=title, title_justify="left")
    table.add_column("what")
    table.add_column("ms", justify="right")
    first = next(iter(seconds))
    if ratios:
        table.add_column(f"times {first}", justify="right")
        table.add_column("times ours, bfloat16", justify="right")
    for name, value in seconds.items():
        row = [name, f"{value * 1e3:.1f}"]
        if ratios:
            other = seconds.get("ours, bfloat16")
            row += [f"{value / seconds[first]:.2f}", f"{value / other:.2f}" if other else ""]
        table.add_row(*row)
    CONSOLE.print(table)


def machine() -> dict[str, Any]:
    """Return what this machine is."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


MODES: dict[str, list[Callable[[argparse.Namespace], dict[str, Any]]]] = {
    "all": [model_alone, whole_job, stages],
    "model": [model_alone],
    "job": [whole_job],
    "stages": [stages],
    "scaling": [scaling],
    "compile": [compiled],
    "gpu": [gpu],
}


def main() -> None:
    """Run the chosen benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", nargs="?", default="all", choices=MODES)
    parser.add_argument("--official", type=Path, help="a checkout of facebookresearch/detr")
    parser.add_argument("--runs", type=int, default=5, help="runs of each contestant, after one to warm up")
    parser.add_argument("--job-runs", type=int, default=3, help="the same for the whole job")
    parser.add_argument("--images", type=int, default=16, help="images of the whole job")
    parser.add_argument("--peer-batch-size", type=int, default=8, help="the larger batch of the peers")
    parser.add_argument("--numbers", type=int, nargs="+", default=[100, 1000, 10000], help="images, for scaling")
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    results: dict[str, Any] = {"machine": machine()}
    CONSOLE.print(results["machine"])
    for benchmark in MODES[options.mode]:
        results[benchmark.__name__] = benchmark(options)
    if options.output:
        options.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
