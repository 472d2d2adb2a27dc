"""A small trained DETR and pictures for it, to try everything without a download."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path
from typing import Any

from detr_lightning.shipped import DEMO


def demo(images: int | None = None, seed: int = 7) -> dict[str, Any]:
    """Return settings for `extract`: the demo's pictures, annotations and weights, and a temporary output folder.

    Args:
        images: The number of new pictures to draw; by default, the 24 that come with the package are used.
        seed: The seed of the new pictures. Seeds 0, 1 and 2 gave the training set, the held-out set and the 24.

    Returns:
        Keyword arguments: `store = extract(**demo())`. Drawn pictures and embeddings are removed when Python exits.
    """
    from detr_lightning.demo.pictures import ANNOTATION_FILE, write_dataset

    folder = Path(tempfile.mkdtemp(prefix="detr_demo_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    source = DEMO
    if images is not None:
        write_dataset(folder, images, seed)
        source = folder
    return {
        "images": source / "images",
        "annotation_file": source / ANNOTATION_FILE,
        "weights": DEMO / "detr_demo.pth",
        "output_dir": folder / "embeddings",
        "short_side": 128,
        "long_side": 213,
    }
