"""Make the pictures of the README from the demo's images and its DETR.

    python tools/readme_pictures.py

writes assets/readme/{detections,map,attention,neighbours}.png. For the map and the neighbours it draws 150 more
pictures. The map is a UMAP where umap-learn is installed. explorer_picture.py makes that of the explorer: it needs a
browser.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image
from torchvision.ops import box_iou

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

from detr_lightning import EmbeddingStore, extract
from detr_lightning.analysis import plots
from detr_lightning.analysis.objects import objects
from detr_lightning.demo import demo

ROOT = Path(__file__).resolve().parents[1]
KEYS = ["query_embeddings", "pred_logits", "pred_boxes", "cross_attention"]
GAP = 8


def store_of(images: int | None = None) -> EmbeddingStore:
    """Extract the demo's pictures, or so many new ones, with the demo's DETR."""
    store = extract(**demo(images), keys=KEYS)
    assert isinstance(store, EmbeddingStore)
    return store


def drawn(figure: Figure, width: int) -> Image.Image:
    """Draw a figure so many pixels wide."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=width / figure.get_size_inches()[0])
    return Image.open(png).convert("RGB")


def row(pictures: Sequence[Image.Image], height: int) -> Image.Image:
    """Put pictures side by side, all of one height."""
    resized = [picture.resize((picture.width * height // picture.height, height), 1) for picture in pictures]
    line = Image.new("RGB", (sum(picture.width + GAP for picture in resized) - GAP, height), "white")
    left = 0
    for picture in resized:
        line.paste(picture, (left, 0))
        left += picture.width + GAP
    return line


def chosen(store: EmbeddingStore, table: pd.DataFrame, number: int) -> list[int]:
    """Choose images with four sure objects or more, each detected once, whose JPEGs and so the pictures are small."""
    pixels = {}
    for image_id, rows in table.groupby("image_id"):
        boxes = torch.tensor(rows[["x1", "y1", "x2", "y2"]].to_numpy())
        overlaps = box_iou(boxes, boxes).fill_diagonal_(0)
        if len(rows) >= 4 and rows.score.min() > 0.96 and overlaps.max() < 0.3:
            entry = store.entry(int(image_id))
            pixels[int(image_id)] = entry.width * entry.height
    return sorted(pixels, key=lambda image_id: store.image_path(image_id).stat().st_size / pixels[image_id])[:number]


def write(picture: Image.Image, path: Path) -> None:
    """Write a small PNG: 255 colours are enough for these pictures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    few = picture.quantize(255, Image.Quantize.MEDIANCUT, kmeans=3, dither=Image.Dither.NONE)
    few.save(path, optimize=True)
    print(f"{path}: {picture.width}x{picture.height}, {path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    """Read the command line and make the pictures."""
    parser = argparse.ArgumentParser(description="Make the README's pictures.")
    parser.add_argument("--threshold", type=float, default=0.5, help="the lowest score that is drawn")
    parser.add_argument("--folder", type=Path, default=ROOT / "assets/readme", help="where to write them")
    parser.add_argument("--images", type=int, default=150, help="how many new pictures have neighbours")
    arguments = parser.parse_args()
    threshold, folder = arguments.threshold, arguments.folder
    store = store_of()
    table = objects(store, threshold)
    image_ids = chosen(store, table, 4)
    pictures = [
        drawn(plots.detections(store, image_id, threshold=threshold, label_scale=2), 480) for image_id in image_ids
    ]
    write(row(pictures, 240), folder / "detections.png")
    # Three objects of different categories, in the image that has most categories.
    surest = table.sort_values("score", ascending=False).drop_duplicates(["image_id", "category"])
    various = max(image_ids, key=lambda image_id: (surest.image_id == image_id).sum())
    queries = surest[surest.image_id == various]["query"].tolist()[:3]
    write(drawn(plots.attention(store, various, queries), 1000), folder / "attention.png")

    store = store_of(arguments.images)
    table = objects(store, threshold)
    method = "umap" if importlib.util.find_spec("umap") else "pca"
    write(drawn(plots.embedding_map(table, method), 840), folder / "map.png")
    random = np.random.default_rng(0)
    categories = table.category.value_counts().index[:4]
    starts = [int(random.choice(np.flatnonzero(table.category == category))) for category in categories]
    write(drawn(plots.neighbours(store, table, starts, k=8), 1000), folder / "neighbours.png")


if __name__ == "__main__":
    main()
