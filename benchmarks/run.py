"""Speed against the peers, in one run, side by side.

    python benchmarks/run.py                       the model alone, the whole job, the stages, the machine's limit
    python benchmarks/run.py --official CHECKOUT   with the official code (a checkout of facebookresearch/detr)
    python benchmarks/run.py idle                  the share of a run without the model, for other keys and layouts
    python benchmarks/run.py startup               CPU time from the command to the first image
    python benchmarks/run.py scaling               images/s and memory against images, batch size, workers, threads
    python benchmarks/run.py compile               torch.compile against the default

Contestants take turns, each in its own process, so that drifting machine speed affects all of them equally.
Medians are printed and, with `--output`, written as JSON. The images are made here; photographs take the same time.
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
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from contestants import KEYS, PRECISIONS, Contestant, Ours, device, flops_of_one_image, pixels_of_one_image, timed

from detr_lightning.data.decode import read_image
from detr_lightning.data.files import find_file
from detr_lightning.data.records import ImageRecord
from detr_lightning.format.files import save_tensors
from detr_lightning.format.preprocessing import resized_size
from detr_lightning.model.checkpoints import load
from detr_lightning.model.detr import DETR, fold, normalise

CONSOLE = Console(width=120)
HERE = Path(__file__).parent
MIXED = [(640, 480), (640, 427), (480, 640), (640, 426), (500, 375), (427, 640), (640, 360), (612, 612)]
"""Frequent sizes of COCO's images, width and height."""

Run = Callable[[], float]
"""Does something and returns the seconds it took."""


def medians(runs: dict[str, Run], turns: int) -> dict[str, float]:
    """Run everything in turn, once to warm up and `turns` times to measure; return median seconds."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name, run in runs.items():
            seconds = run()
            if turn:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def make_images(folder: Path, number: int, sizes: Sequence[tuple[int, int]] = ((640, 480),)) -> list[Path]:
    """Write JPEG files with about the detail of photographs, of `sizes` (width, height) in turn."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index in range(number):
        size = sizes[index % len(sizes)]
        coarse = Image.fromarray(generator.integers(0, 256, (60, 80, 3), dtype=np.uint8)).resize(
            size, Image.Resampling.BICUBIC
        )
        grain = generator.normal(0, 8, (size[1], size[0], 3))
        pixels = (np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8)
        paths.append(folder / f"{index + 1}.jpg")
        Image.fromarray(pixels).save(paths[-1], quality=90)
    return paths


@contextlib.contextmanager
def field(options: argparse.Namespace, limit: bool = False) -> Iterator[list[Contestant]]:
    """Start ours and the available peers, in each precision."""
    with contextlib.ExitStack() as stack:
        contestants = []
        for dtype in options.precision:
            contestants += [Contestant("ours", dtype), Contestant("Hugging Face", dtype)]
            if options.official and dtype == "float32":  # its position encoding does not run in bfloat16
                contestants.append(Contestant("official", dtype, checkout=options.official))
            if limit:
                contestants.append(Contestant("machine's limit", dtype))
        for contestant in contestants:
            stack.enter_context(contestant)
        yield contestants


def model_alone(options: argparse.Namespace) -> dict[str, Any]:
    """Time the model alone on one 800x1066 image."""
    with field(options, limit=True) as contestants:
        seconds = medians({f"{one.name}, {one.dtype}": one.forward for one in contestants}, options.runs)
    show("The model alone, one 800x1066 image", seconds)
    flops = flops_of_one_image()
    CONSOLE.print(f"{flops / 1e9:.0f} GFLOP per image")
    return {"seconds": seconds, "flops": flops}


def whole_job(options: argparse.Namespace) -> dict[str, Any]:
    """Time the whole job from JPEG files to `.pt` files, per image and without start-up."""
    with tempfile.TemporaryDirectory() as temporary, field(options) as contestants:
        folder = Path(temporary) / "images"
        make_images(folder, options.images)

        def job(contestant: Contestant, **settings: Any) -> float:
            with tempfile.TemporaryDirectory() as output:
                return contestant.job(folder=folder, output=Path(output) / "out", **settings) / options.images

        runs: dict[str, Run] = {}
        for one in contestants:
            if one.name == "ours":
                runs[f"ours, {one.dtype}"] = partial(job, one)
                continue
            for size in (1, options.peer_batch_size):
                name = f"{one.name}, batch {size}, {one.dtype}"
                runs[name] = partial(job, one, batch_size=size)
        seconds = medians(runs, options.job_runs)
    show(f"The whole job, {options.images} JPEG files of 640x480, an image", seconds)
    return {"seconds": seconds}


def stages(options: argparse.Namespace) -> dict[str, Any]:
    """Time each stage of the processing of an image, and measure the share of a run without the model."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "images"
        make_images(folder, options.images)
        record = ImageRecord(1, "1.jpg", 640, 480)
        path, size = find_file(folder, record.file_name), resized_size(record.size)
        rows: dict[str, float] = {}
        idle: dict[str, float] = {}
        for dtype in PRECISIONS:
            rows |= {f"{name}, {dtype}": seconds for name, seconds in model_stages(dtype, options.runs).items()}
            idle[dtype] = model_idle(dtype, folder, options)
        with torch.inference_mode():
            out = fold(DETR().eval())(pixels_of_one_image().cpu(), keys=KEYS)
        one = {key: value[0].clone() for key, value in out.items()}
        around: dict[str, Callable[[], Any]] = {
            "read and resize, pil": lambda: read_image(path, record, size),
            "read and resize, torchvision": lambda: read_image(path, record, size, "torchvision"),
            "write one decoder file": lambda: save_tensors(Path(temporary), 1, one),
        }
        rows |= medians({name: partial(timed, run) for name, run in around.items()}, options.runs * 4)
    show("Stages, one image", rows, ratios=False)
    for name, value in idle.items():
        CONSOLE.print(f"Share of the whole job in which the model is not running, {name}: {value:.1%}")
    return {"seconds": rows, "model_idle": idle}


def model_stages(dtype: str, turns: int) -> dict[str, float]:
    """Time the parts of the model on one image."""
    ours = Ours(dtype)
    ours.forward()
    model, pixels = ours.extractor.network, ours.pixels
    assert model is not None
    with torch.inference_mode():
        images = normalise(pixels).to(ours.dtype)
        features = model.backbone[0](images)
        position = model.backbone[1](features)
        tokens = model.input_proj(features).permute(0, 2, 3, 1).flatten(1, 2)
        memory = model.transformer.encoder(tokens, position)[-1]
        out = model(pixels, keys=KEYS)

        def decode() -> None:
            decoded, _ = model.transformer.decoder(model.query_embed.weight, memory, position, None, False)
            model.predict(decoded[-1])

        parts: dict[str, Callable[[], Any]] = {
            "normalise": lambda: normalise(pixels),
            "backbone": lambda: model.backbone[0](images),
            "encoder": lambda: model.transformer.encoder(tokens, position),
            "decoder and heads": decode,
            "model in all": lambda: model(pixels, keys=KEYS),
            "device to host": lambda: {key: value.cpu() for key, value in out.items()},
        }
        return medians({name: partial(timed, run) for name, run in parts.items()}, turns)


def idle(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the share of a run without the model, for different keys and layouts."""
    objects = {"keys": ("query_embeddings", "pred_logits", "pred_boxes")}
    jobs: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "decoder keys, a file per image": ({}, {}),
        "objects.yaml": (objects, {"min_score": 0.5}),
        "decoder keys, a Lance table": ({}, {"layout": "lance"}),
    }
    shares = {}
    with tempfile.TemporaryDirectory() as temporary:
        make_images(Path(temporary), options.images)
        for name, (model, writer) in jobs.items():
            for dtype in options.precision:
                share = model_idle(dtype, Path(temporary), options, model, writer)
                shares[f"{name}, {dtype}"] = share
                CONSOLE.print(f"Share of the whole job in which the model is not running, {name}, {dtype}: {share:.1%}")
    return {"model_idle": shares}


def model_idle(
    dtype: str,
    folder: Path,
    options: argparse.Namespace,
    model: dict[str, Any] | None = None,
    writer: dict[str, Any] | None = None,
) -> float:
    """Return the median share of a job in which the model is not running, after one job to warm up."""
    shares = []
    with Contestant("ours", dtype, **(model or {})) as ours:
        for _ in range(options.job_runs + 1):
            with tempfile.TemporaryDirectory() as output:
                ours.job(folder=folder, output=Path(output) / "out", **(writer or {}))
            shares.append(ours.idle())
    return statistics.median(shares[1:])


STARTUP = """
import os, resource, sys
def stop(*_):
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(used.ru_utime + used.ru_stime, flush=True)
    os._exit(0)
import lightning.pytorch.cli
if len(sys.argv) == 1:
    stop()
from detr_lightning.command.main import main
from detr_lightning.extractor import DETRExtractor
DETRExtractor.predict_step = stop
sys.exit(main(sys.argv[1:]))
"""
"""Prints the CPU seconds of the import, or, with a command, of all until the first image reaches the model."""


def startup(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the CPU time from the command to the first image, with DETR-R50's weights in a file."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "images"
        make_images(folder, 8)
        weights = Path(temporary) / "weights.pth"
        torch.save({"model": load("random").model.state_dict()}, weights)

        command = ["predict", "--config", str(HERE.parent / "configs" / "decoder.yaml")]
        command += ["--model.weights", str(weights), "--data.image_dir", str(folder), "--data.annotation_file", "null"]

        def cpu_seconds(*arguments: str) -> float:
            line = [sys.executable, "-c", STARTUP, *arguments]
            return float(subprocess.run(line, capture_output=True, text=True, check=True).stdout.split()[-1])

        def predict() -> float:
            with tempfile.TemporaryDirectory() as output:
                return cpu_seconds(*command, "--output_dir", output)

        runs: dict[str, Run] = {"import lightning.pytorch.cli": cpu_seconds, "predict, to the first image": predict}
        seconds = medians(runs, options.runs)
    show("Start-up, seconds of CPU time", seconds, ratios=False)
    return {"seconds": seconds}


def scaling(options: argparse.Namespace) -> dict[str, Any]:
    """Print images/s and peak memory against the number of images, batch size, workers and writing threads."""
    demo = str(HERE.parent / "assets" / "demo" / "detr_demo.pth")
    sweeps = {"batch_size": (1, 4, 8, 16, 32), "num_workers": (0, 1, 2, 4), "threads": (1, 2, 4)}
    small = {"short_side": 128, "long_side": 213}
    runs: list[tuple[dict[str, Any], dict[str, Any]]] = [
        *(({"weights": demo}, {"limit": number}) for number in options.numbers),
        *(({"weights": demo}, {"limit": 500, name: value}) for name, values in sweeps.items() for value in values),
        *(({}, {"limit": 32, "batch_size": batch_size}) for batch_size in (1, 2, 4, 8, 16)),
        *(({"extract_type": "all"}, {"limit": number, "batch_size": 8}) for number in (16, 32, 64)),
    ]
    result = {}
    table = Table("run", title="Scaling", title_justify="left")
    for column in ("images/s", "peak memory, MB"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as temporary:
        many, photographs = Path(temporary) / "many", Path(temporary) / "photographs"
        make_images(many, max(*options.numbers, 500), [(192, 144), (144, 192), (160, 160)])
        make_images(photographs, 64)
        for model, settings in runs:
            folder, more = (many, small) if "weights" in model else (photographs, {})
            with Contestant("ours", "float32", **model) as ours, tempfile.TemporaryDirectory() as output:
                seconds = ours.job(folder=folder, output=Path(output) / "out", **settings, **more)
                memory = ours.peak_memory()
            shown = {**settings, **{key: value for key, value in model.items() if key != "weights"}}
            name = ", ".join(
                [
                    "demo model" if "weights" in model else "DETR-R50",
                    *(f"{key} {value}" for key, value in shown.items()),
                ]
            )
            result[name] = {"images_per_second": settings["limit"] / seconds, "peak_mb": memory}
            table.add_row(name, f"{settings['limit'] / seconds:.2f}", f"{memory:.0f}")
    CONSOLE.print(table)
    return result


def compiled(options: argparse.Namespace) -> dict[str, Any]:
    """Compare `model.compile` with the default on images of many shapes, with nothing compiled or cached before."""
    result = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "mixed"
        make_images(folder, options.images, MIXED)
        for dtype in PRECISIONS:
            for name, settings in ((f"default, {dtype}", {}), (f"model.compile, {dtype}", {"compile": True})):
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(temporary) / f"cache-{len(result)}")  # no spaces
                with Contestant("ours", dtype, **settings) as ours:
                    seconds = ours.job(warm_up=False, folder=folder, output=Path(temporary) / name)
                result[name] = seconds / options.images
    show(f"{options.images} images of {len(MIXED)} shapes, an image, compilation included", result, ratios=False)
    return {"seconds": result}


def show(title: str, seconds: dict[str, float], ratios: bool = True) -> None:
    """Print times, and their ratios to ours."""
    table = Table("what", title=title, title_justify="left")
    table.add_column("ms", justify="right")
    ours = {f"times {name}": value for name, value in seconds.items() if name.startswith("ours, ")} if ratios else {}
    for column in ours:
        table.add_column(column, justify="right")
    for name, value in seconds.items():
        table.add_row(name, f"{value * 1e3:.1f}", *(f"{value / other:.2f}" for other in ours.values()))
    CONSOLE.print(table)


def machine() -> dict[str, Any]:
    """Return a description of this machine."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if device().type == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


MODES: dict[str, list[Callable[[argparse.Namespace], dict[str, Any]]]] = {
    "all": [model_alone, whole_job, stages],
    "model": [model_alone],
    "job": [whole_job],
    "stages": [stages],
    "idle": [idle],
    "startup": [startup],
    "scaling": [scaling],
    "compile": [compiled],
}


def main() -> None:
    """Run the chosen benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", nargs="?", default="all", choices=MODES)
    parser.add_argument("--official", type=Path, help="a checkout of facebookresearch/detr")
    parser.add_argument("--precision", nargs="+", default=list(PRECISIONS), choices=PRECISIONS, help="of both sides")
    parser.add_argument("--runs", type=int, default=9, help="runs of each contestant, after one to warm up")
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
