"""Detection of the objects in a query image, with the model and the settings of an extraction."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from detr_lightning.analysis.overlap import overlaps
from detr_lightning.analysis.pictures import read_picture
from detr_lightning.errors import DETRLightningError, InputError, SettingError
from detr_lightning.store.predictions import Predictions
from detr_lightning.store.store import EmbeddingStore

if TYPE_CHECKING:
    import pandas as pd

_PREPROCESSING = ("short_side", "long_side", "image_backend", "exif")
"""The preprocessing settings of the extraction that also apply to the query image."""


def query_objects(
    store: EmbeddingStore,
    image: str | os.PathLike[str] | Image.Image,
    *,
    box: Sequence[float] | None = None,
    crop: Sequence[float] | None = None,
    threshold: float = 0.7,
    key: str = "query_embeddings",
    layer: int = -1,
    weights: str | os.PathLike[str] | None = None,
) -> pd.DataFrame:
    """Return the objects in an image, as queries for a search among the objects of a store.

    The image goes through the store's model, with the preprocessing and precision of the store, whether or not the
    processor has instructions for it. Only a file without `crop` is read by the store's `image_backend`, so that an
    image of the store gives its own objects; Pillow resizes a PIL image or a crop.

    Args:
        store: The extraction.
        image: A file, or a PIL image.
        box: `[x, y, width, height]` in pixels: return only the detection that overlaps it most, whatever its score.
        crop: `[x, y, width, height]` in pixels: the part of the image that the model sees.
        threshold: The lowest score of an object; not used with `box`.
        key: As for `objects`.
        layer: As for `objects`.
        weights: The model's weights, if they have moved since the extraction.

    Returns:
        A table as `objects` returns it. Boxes are in pixels of the whole image.

    Raises:
        FileNotFoundError: The image or the weights do not exist.
        UnreadableImageError: The image cannot be read.
        InputError: The weights are not those of the extraction, or nothing was found.
        SettingError: The box or crop is not inside the image.
    """
    from detr_lightning.analysis.objects import frame_of
    from detr_lightning.analysis.reader import ObjectReader

    path = None if isinstance(image, Image.Image) else Path(image).expanduser()
    if path is not None and not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. Give an image to search with.")
    name = "image" if path is None else str(path)
    whole = read_picture(store, path or image)
    seen, x, y = path or whole, 0, 0
    if crop is not None:
        x, y, width, height = _inside(crop, whole, "crop")
        seen = whole.crop((x, y, x + width, y + height))
    if box is not None:
        left, top, width, height = _inside(box, whole, "box")
        wanted = np.array([[left, top, left + width, top + height]], float)
    extracted = _extract(store, seen, [key, "pred_logits", "pred_boxes"], weights)
    reader = ObjectReader(extracted, threshold if box is None else 0.0, key=key, layer=layer)
    table = frame_of(reader, progress=False)
    if table.empty:
        raise InputError(f"{name}: no object scores {threshold} or more; the best scores {reader.shown_best}.")
    names = Predictions(store).names
    table["category"] = [names.get(number, str(number)) for number in table["category_id"]]
    table["file_name"] = name
    table[["x1", "x2"]] += x
    table[["y1", "y2"]] += y
    table["bbox"] = [[left + x, top + y, *size] for left, top, *size in table["bbox"]]
    if box is None:
        return table
    shared = overlaps(table[["x1", "y1", "x2", "y2"]].to_numpy(float), wanted)[:, 0]
    if not shared.max():
        raise InputError(f"{name}: no detection overlaps the box {list(box)}.")
    return table.iloc[[int(shared.argmax())]].reset_index(drop=True)


def _inside(box: Sequence[float], picture: Image.Image, name: str) -> tuple[int, int, int, int]:
    """Check a box `[x, y, width, height]`, and return it in whole pixels."""
    if len(box) != 4 or not np.isfinite(box).all():
        raise SettingError(f"{name} is {list(box)}; give x, y, width and height in pixels.")
    x, y, width, height = (round(number) for number in box)
    if width < 1 or height < 1 or x < 0 or y < 0 or x + width > picture.width or y + height > picture.height:
        raise SettingError(
            f"{name} is {list(box)} (x, y, width, height), which is not inside the image of "
            f"{picture.width}x{picture.height} pixels."
        )
    return x, y, width, height


def _extract(
    store: EmbeddingStore, image: Path | Image.Image, keys: list[str], weights: str | os.PathLike[str] | None
) -> EmbeddingStore:
    """Run the store's model on an image, and return the embeddings, which stay in memory."""
    from detr_lightning.extractor import DETRExtractor

    run = store.metadata_file.run
    recorded = run.settings
    given = run.config.get("model") or {}
    place = os.fspath(weights or given.get("weights") or recorded.model.weights)
    precision = recorded.precision.removesuffix(", TF32")
    settings: dict[str, Any] = {name: given.get(name) for name in ("nheads", "dilation", "ema")}
    settings["tf32"] = precision != recorded.precision
    expected = recorded.model.sha256
    advice = (
        f"{store.name} was extracted with weights of SHA-256 {expected[:8]}. "
        "Set --weights (in Python, weights) to their file."
    )
    try:
        model = DETRExtractor(place, keys=keys, **settings)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} {advice}") from error
    except DETRLightningError as error:  # another number of heads, for example
        raise InputError(f"{place} contains other weights ({error}). {advice}") from error
    if model.checkpoint.sha256 != expected:
        raise InputError(f"{place} contains other weights, of SHA-256 {model.checkpoint.sha256[:8]}. {advice}")
    data = {name: recorded.preprocessing[name] for name in _PREPROCESSING if name in recorded.preprocessing}
    data["max_image_pixels"] = store.metadata_file.max_image_pixels
    return model.extract([image], precision=precision, allow_slow_precision=True, progress=False, **data)
