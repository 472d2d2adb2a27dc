"""The start, the end and the resume of runs of many images, with constant pixels and tensors.

    python benchmarks/startup.py --numbers 10000 100000 1000000

For each number of images and each layout: the real command until the first batch reaches the model, a whole run whose
images and embeddings are constants and which does not wait for the disk (no fsync), the same command again on the
finished run, and opening the result. Every step runs in its own process.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

HERE = Path(__file__).parent
WIDTH, HEIGHT = 64, 48

RUN = """
import os, resource, sys, time
import torch
from detr_lightning.command.main import main
from detr_lightning.data.loading import ImageReader
from detr_lightning.extractor import DETRExtractor

stop_at_first = sys.argv.pop(1) == "plan"
began = time.perf_counter()

def forward(self, pixels, padding_mask=None, keys=None):
    if stop_at_first:
        print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, flush=True)
        os._exit(0)
    embeddings = torch.zeros(len(pixels), self.detr.architecture.num_queries, self.detr.architecture.hidden_dim)
    return {"query_embeddings": embeddings}

def last(self):
    print("last batch", time.perf_counter() - began, flush=True)

def read(self, record, size):
    return torch.zeros(3, *size, dtype=torch.uint8), {}

DETRExtractor.forward = forward
DETRExtractor.on_predict_epoch_end = last
ImageReader.__call__ = read
os.fsync = lambda descriptor: None
code = main(sys.argv[1:])
print("seconds", time.perf_counter() - began, flush=True)
sys.exit(code)
"""

AGAIN = """
import sys, time
began = time.perf_counter()
from detr_lightning.command.main import main
code = main(sys.argv[1:])
print("seconds", time.perf_counter() - began, flush=True)
sys.exit(code)
"""

OPEN = """
import sys, time
from detr_lightning import EmbeddingStore
began = time.perf_counter()
store = EmbeddingStore(sys.argv[1])
first = next(iter(store))
store[first]
print("seconds", time.perf_counter() - began, flush=True)
"""


def annotate(path: Path, number: int) -> None:
    """Write a COCO annotation file of many images, with a box each."""
    with path.open("w") as file:
        file.write('{"images": [')
        for i in range(1, number + 1):
            entry = {"id": i, "file_name": f"{i:012d}.jpg", "width": WIDTH, "height": HEIGHT}
            file.write(("," if i > 1 else "") + json.dumps(entry))
        file.write('], "annotations": [')
        for i in range(1, number + 1):
            box = {"id": i, "image_id": i, "category_id": 1, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0}
            file.write(("," if i > 1 else "") + json.dumps(box))
        file.write('], "categories": [{"id": 1, "name": "person"}]}')


def measured(script: str, *words: str) -> dict[str, float]:
    """Run a script in its own process; return what it printed, and its seconds, wall and CPU."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=False)
    wall = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{' '.join(words)}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = {"wall": wall, "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}
    for line in done.stdout.splitlines():
        for name in ("seconds", "last batch", "peak"):
            if line.startswith(f"{name} "):
                found[name] = float(line.split()[-1])
    return found


def main() -> None:
    """Print a row per number of images and layout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numbers", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--layouts", nargs="+", default=["files", "lance"], choices=("files", "lance"))
    parser.add_argument("--folder", type=Path, help="where the runs are written; by default, the temporary folder")
    options = parser.parse_args()
    print("images, layout | plan, s wall / CPU / peak GB | after the last batch, s | again, s wall / CPU | open, s")
    for number in options.numbers:
        for layout in options.layouts:
            with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
                row = one(Path(temporary), number, layout)
            print(f"{number}, {layout} | {row}", flush=True)


def one(folder: Path, number: int, layout: str) -> str:
    """Measure one number of images in one layout."""
    annotations, images, out = folder / "annotations.json", folder / "images", folder / "out"
    annotate(annotations, number)
    images.mkdir()
    Image.new("RGB", (WIDTH, HEIGHT)).save(images / f"{1:012d}.jpg")
    words: list[Any] = ["predict", "--data.image_dir", images, "--data.annotation_file", annotations]
    words += ["--model.weights", HERE.parent / "assets" / "demo" / "detr_demo.pth", "--data.short_side", HEIGHT]
    words += ["--data.long_side", WIDTH, "--data.batch_size", 256, "--model.keys", "[query_embeddings]"]
    words += ["--writer.layout", layout, "--output_dir", out]
    command = [str(word) for word in words]
    plan = measured(RUN, "plan", *command)
    whole = measured(RUN, "whole", *command)
    size = sum(1 for _ in out.iterdir())
    print(
        f"  {number}, {layout}: whole run {whole['wall']:.0f} s, {size} names in the folder",
        file=sys.stderr,
        flush=True,
    )
    again = measured(AGAIN, *command)
    opened = measured(OPEN, str(out))
    end = whole["seconds"] - whole["last batch"]
    return (
        f"{plan['wall']:.1f} / {plan['cpu']:.1f} / {plan['peak']:.2f} | {end:.1f} | "
        f"{again['wall']:.1f} / {again['cpu']:.1f} | {opened['seconds']:.2f}"
    )


if __name__ == "__main__":
    main()
