"""The images of a store, as its boxes refer to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detr_lightning import extract
from detr_lightning.analysis import plots
from detr_lightning.analysis.pictures import open_picture

SMALL: dict[str, Any] = {"keys": ["pred_logits", "pred_boxes"], "short_side": 64, "long_side": 128, "progress": False}


def test_a_picture_is_turned_as_the_model_saw_it(tiny_weights: Path, tmp_path: Path) -> None:
    tag = Image.Exif()
    tag[0x0112] = 6
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8))
    for name in ("1.jpg", "2.tif", "3.png"):
        picture.save(tmp_path / name, exif=tag)
    png = (tmp_path / "3.png").read_bytes()
    begin = png.index(b"eXIf") - 4
    end = begin + 12 + int.from_bytes(png[begin : begin + 4], "big")
    # With its tag behind the pixels, where the header's reader does not look, a PNG is not turned.
    (tmp_path / "4.png").write_bytes(png[:begin] + png[end:-12] + png[begin:end] + png[-12:])
    store = extract(tmp_path, weights=tiny_weights, exif="apply", **SMALL)
    assert [store.entry(image_id).size for image_id in store] == [(64, 48)] * 3 + [(48, 64)]
    for image_id in store:
        shown = open_picture(store, image_id, tmp_path)
        assert shown.size == store.entry(image_id).size[::-1]
        assert not shown.getexif()  # Nothing that reads it further turns it again.


def test_a_picture_of_another_size_is_refused(tiny_weights: Path, tmp_path: Path) -> None:
    for name, size in (("images", (64, 48)), ("half", (32, 24))):
        (tmp_path / name).mkdir()
        Image.new("RGB", size).save(tmp_path / name / "1.png")
    store = extract(tmp_path / "images", weights=tiny_weights, **SMALL)
    plots.detections(store, 1, threshold=0)
    message = r"half.1\.png is 32x24 \(width x height\), but was 64x48 at the extraction\. Give image_dir"
    with pytest.raises(ValueError, match=message):
        plots.detections(store, 1, tmp_path / "half", threshold=0)


def test_large_images_are_read_as_in_the_extraction(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.new("RGB", (64, 48)).save(tmp_path / "1.png")
    store = extract(tmp_path, weights=tiny_weights, max_image_pixels=64 * 48, **SMALL)
    assert Image.MAX_IMAGE_PIXELS == 1000
    assert open_picture(store, 1).size == (64, 48)
    assert Image.MAX_IMAGE_PIXELS == 1000
