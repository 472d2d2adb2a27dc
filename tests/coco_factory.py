"""Images of noise and their annotations, small enough to extract in a moment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

SIZES = ((96, 64), (64, 96), (64, 64), (120, 64), (80, 80), (64, 96), (200, 100), (64, 64))
"""Width and height of the images, in the order of their ids."""

SMALL = ("--data.short_side", "64", "--data.long_side", "128", "--data.num_workers", "0")


class Coco(NamedTuple):
    """A folder of images, and their annotations."""

    images: Path
    annotations: Path

    @property
    def data(self) -> tuple[str, ...]:
        """Return the arguments that name them, with everything small."""
        names = ("--data.image_dir", str(self.images), "--data.annotation_file", str(self.annotations))
        return (*names, *SMALL)


def make_coco(folder: Path, count: int, seed: int = 0) -> Coco:
    """Write images of noise with ids 1, 4, 7, ... and an annotation file with one box each."""
    generator = np.random.default_rng(seed)
    images = folder / "images"
    images.mkdir(parents=True)
    content: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}],
    }
    for number in range(count):
        width, height = SIZES[number % len(SIZES)]
        image_id, file_name = 3 * number + 1, f"{3 * number + 1:012d}.jpg"
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(images / file_name)
        content["images"].append({"id": image_id, "file_name": file_name, "width": width, "height": height})
        content["annotations"].append(
            {
                "id": number + 1,
                "image_id": image_id,
                "category_id": 1,
                "bbox": [8, 8, 32, 24],
                "area": 768,
                "iscrowd": 0,
            }
        )
    annotations = folder / "instances.json"
    annotations.write_text(json.dumps(content))
    return Coco(images, annotations)
