"""Draw a synthetic object detection dataset in COCO's format: shapes of six classes on textured backgrounds.

    python -m detr_lightning.demo.pictures assets/demo --images 24 --seed 2

writes `images/*.jpg` and `instances_demo.json`. Every picture depends only on the seed and its number. The same
versions of numpy and Pillow give the same bytes; others may round differently.
"""

from __future__ import annotations

import argparse
import io
import json
import math
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

CATEGORIES = {1: "circle", 3: "square", 7: "triangle", 8: "star", 10: "ring", 13: "cross"}
"""Sparse ids, like COCO's."""
SIZES = ((192, 144), (144, 192), (160, 160), (256, 192))
"""Width and height of the pictures."""
SUPERSAMPLING = 3
ANNOTATION_FILE = "instances_demo.json"


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture: the JPEG file's bytes, its size, and COCO annotations without `id` and `image_id`."""

    jpeg: bytes
    width: int
    height: int
    annotations: list[dict[str, Any]]


def outline(category_id: int) -> np.ndarray:
    """Return a shape's outline as one polygon `[N, 2]` around the origin, inside the unit circle."""

    def regular(points: int, start: float = 0.0) -> np.ndarray:
        angle = start + np.linspace(0, 2 * math.pi, points, endpoint=False)
        return np.stack([np.sin(angle), -np.cos(angle)], axis=1)

    name = CATEGORIES[category_id]
    if name == "circle":
        return regular(36)
    if name == "square":
        return regular(4, math.pi / 4)
    if name == "triangle":
        return regular(3)
    if name == "star":
        return regular(10) * np.where(np.arange(10) % 2, 0.42, 1.0)[:, None]
    if name == "ring":  # one line around the outside, then back around the hole
        circle = regular(36)
        closed = np.concatenate([circle, circle[:1]])
        return np.concatenate([closed, closed[::-1] * 0.55])
    inner, outer = 0.28, 0.92
    corner = [(inner, inner), (inner, outer), (-inner, outer), (-inner, inner)]
    turns = [np.array([[math.cos(t), math.sin(t)], [-math.sin(t), math.cos(t)]]) for t in np.arange(4) * math.pi / 2]
    return np.concatenate([np.array(corner[:3]) @ turn for turn in turns])


def background(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Return `[height, width, 3]`, floats from 0 to 255: a gradient or stripes, clouds, and noise."""
    first, second = rng.uniform(30, 225, 3), rng.normal(0, 30, 3)
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    across = (x * math.cos(angle) + y * math.sin(angle))[..., None]
    if rng.random() < 0.5:
        pattern = across / max(width, height) * second * 2
    else:
        pattern = np.sin(across * 2 * math.pi / rng.uniform(6, 40)) * second * 0.6
    grid = rng.normal(0, rng.uniform(2, 16), (rng.integers(3, 12), rng.integers(3, 12))).astype(np.float32)
    clouds = np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC))[..., None]
    noise = rng.standard_normal((height, width, 1), dtype=np.float32) * rng.uniform(0, 14)
    pixels: np.ndarray = np.clip(first + pattern + clouds + noise, 0, 255)
    return pixels


def contrasting(rng: np.random.Generator, color: np.ndarray) -> np.ndarray:
    """Return a random color that contrasts with another."""
    while True:
        candidate = rng.uniform(0, 255, 3)
        if np.linalg.norm(candidate - color) > 110:
            return np.asarray(candidate)


def polygon_mask(polygons: list[np.ndarray], width: int, height: int, scale: int = 1) -> Image.Image:
    """Draw filled polygons as a grayscale mask, 255 inside; `scale` is the supersampling factor, for soft edges."""
    mask = Image.new("L", (width * scale, height * scale))
    draw = ImageDraw.Draw(mask)
    for polygon in polygons:
        draw.polygon([tuple(point) for point in (polygon * scale).tolist()], fill=255)
    return mask.reduce(scale) if scale > 1 else mask


def run_lengths(mask: np.ndarray) -> list[int]:
    """Encode a boolean mask `[height, width]` as COCO's run lengths: down the columns, starting with zeros."""
    runs = [(bool(value), len(list(run))) for value, run in groupby(mask.flatten(order="F").tolist())]
    return ([0] if runs[0][0] else []) + [length for _, length in runs]


def annotate(category_id: int, polygons: list[np.ndarray], width: int, height: int) -> dict[str, Any]:
    """Return the COCO annotation of one object, or of a crowd if there are several polygons."""
    points = np.concatenate(polygons)
    (left, top), (right, bottom) = points.min(0).tolist(), points.max(0).tolist()
    annotation: dict[str, Any] = {"category_id": category_id, "iscrowd": int(len(polygons) > 1)}
    if annotation["iscrowd"]:
        mask = np.asarray(polygon_mask(polygons, width, height)) > 0
        annotation["segmentation"] = {"counts": run_lengths(mask), "size": [height, width]}
        annotation["area"] = int(mask.sum())
    else:
        (polygon,) = polygons
        following = np.roll(polygon, -1, axis=0)
        doubled = polygon[:, 0] * following[:, 1] - polygon[:, 1] * following[:, 0]
        annotation["segmentation"] = [polygon.flatten().round(2).tolist()]
        annotation["area"] = round(abs(float(doubled.sum())) / 2, 2)
    annotation["bbox"] = [round(value, 2) for value in (left, top, right - left, bottom - top)]
    return annotation


def place(
    rng: np.random.Generator, radius: float, taken: list[tuple[float, ...]], width: int, height: int
) -> np.ndarray | None:
    """Return a center where a circle of this radius touches no other, and add it to `taken`; None after 30 tries."""
    for _ in range(30):
        center = rng.uniform((radius + 1, radius + 1), (width - radius - 1, height - radius - 1))
        if all(math.dist(center, other[:2]) > radius + other[2] for other in taken):
            taken.append((*center.tolist(), radius))
            return center
    return None


def draw_picture(seed: int, number: int) -> Picture:
    """Draw picture `number` of the dataset with this seed: mostly one to five objects, sometimes none, or a crowd."""
    rng = np.random.default_rng([seed, number])
    width, height = SIZES[number % len(SIZES)]
    pixels = background(rng, width, height)
    taken: list[tuple[float, ...]] = []
    annotations: list[dict[str, Any]] = []

    kind = rng.random()
    crowd, count = kind < 0.08, 0 if 0.08 <= kind < 0.13 else int(rng.integers(1, 6))
    unit = min(width, height)
    for index in range(count):
        category_id = int(rng.choice(list(CATEGORIES)))
        is_crowd = crowd and index == 0
        radius = unit * float(rng.uniform(0.18, 0.25) if is_crowd else rng.uniform(0.1, 0.27))
        center = place(rng, radius, taken, width, height)
        if center is None:
            continue
        angle = rng.uniform(-0.35, 0.35)
        turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        shape = outline(category_id) @ turn
        polygons = [center + radius * shape]
        if is_crowd:  # many tiny shapes instead of one
            cells = [(x, y) for x in (-0.6, 0.0, 0.6) for y in (-0.6, 0.0, 0.6)]
            jitter = rng.uniform(-0.06, 0.06, (len(cells), 2))
            polygons = [center + radius * (offset + 0.2 * shape) for offset in np.array(cells) + jitter]
        color = contrasting(rng, pixels[int(center[1]), int(center[0])])
        shade = rng.normal(0, 20, 3) * np.linspace(-1, 1, height)[:, None, None]
        alpha = np.asarray(polygon_mask(polygons, width, height, SUPERSAMPLING), dtype=np.float32)[..., None] / 255
        pixels = pixels + alpha * (color + shade - pixels)
        annotations.append(annotate(category_id, polygons, width, height))

    buffer = io.BytesIO()
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    image.save(buffer, "JPEG", quality=int(rng.integers(75, 93)))
    return Picture(buffer.getvalue(), width, height, annotations)


def write_dataset(folder: Path, images: int, seed: int) -> Path:
    """Write pictures 1 to `images` and their annotations; return the annotation file."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(1, images + 1):
        picture = draw_picture(seed, number)
        file_name = f"{number:012d}.jpg"
        (folder / "images" / file_name).write_bytes(picture.jpeg)
        records.append({"id": number, "file_name": file_name, "width": picture.width, "height": picture.height})
        for annotation in picture.annotations:
            annotations.append({"id": len(annotations) + 1, "image_id": number, **annotation})
    content = {
        "info": {"description": "Synthetic shapes", "seed": seed},
        "images": records,
        "annotations": annotations,
        "categories": [{"id": i, "name": name, "supercategory": "shape"} for i, name in CATEGORIES.items()],
    }
    path = folder / ANNOTATION_FILE
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")
    return path


def main() -> None:
    """Read the command line and write the dataset."""
    parser = argparse.ArgumentParser(description="Draw a synthetic dataset in COCO's format.")
    parser.add_argument("folder", type=Path, help="where to write images/ and " + ANNOTATION_FILE)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    print(write_dataset(arguments.folder, arguments.images, arguments.seed))


if __name__ == "__main__":
    main()
