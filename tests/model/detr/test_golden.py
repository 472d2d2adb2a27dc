"""What the official code returned for three COCO images, recorded once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from places import SHARED
from torch import Tensor

from detr_lightning.data.decode import read_image
from detr_lightning.data.records import ImageRecord
from detr_lightning.format.preprocessing import resized_size
from detr_lightning.model import checkpoints
from detr_lightning.model.detr import fold, normalise
from detr_lightning.model.detr.detr import DETR

GOLDEN, IMAGES = SHARED / "golden", SHARED / "coco" / "val2017"
pytestmark = pytest.mark.skipif(
    not (GOLDEN / "expected.pt").is_file() or not IMAGES.is_dir(),
    reason="the official outputs (../shared/golden) and their images (../shared/coco) are not here",
)
KEYS = ("backbone_features", "encoder_output", "decoder_output", "query_embeddings", "pred_logits", "pred_boxes")
NAMES = ("000000549055.jpg", "000000536038.jpg", "000000000139.jpg")


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    recorded: dict[str, Any] = torch.load(GOLDEN / "expected.pt")
    return recorded


@pytest.fixture(scope="module", params=[False, True], ids=["as loaded", "folded"])
def model(request: pytest.FixtureRequest) -> DETR:
    loaded = checkpoints.load(str(GOLDEN / "detr_r18_tiny.pth")).model
    return fold(loaded) if request.param else loaded


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def pixels_of(file_name: str) -> Tensor:
    with Image.open(IMAGES / file_name) as image:
        record = ImageRecord(1, file_name, image.width, image.height)
    return read_image(IMAGES / file_name, record, resized_size((record.height, record.width)))[0]


@pytest.mark.parametrize("name", NAMES)
def test_single_images(expected: dict[str, Any], model: DETR, name: str) -> None:
    recorded = expected["single"][name]
    pixels = pixels_of(name)[None]
    assert list(pixels.shape[-2:]) == recorded["input_size"].tolist()

    normalised = normalise(pixels)[0]
    assert torch.equal(normalised[:, :48, :48], recorded["pixels_corner"])
    torch.testing.assert_close(normalised.mean((1, 2)), recorded["pixels_mean"], rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        out = model(pixels, keys=KEYS)
    for key in KEYS:
        assert error(out[key][0], recorded[key]) < 1e-5, key
    assert torch.equal(out["decoder_output"][0, -1], out["query_embeddings"][0])


def test_padded_batch(expected: dict[str, Any], model: DETR) -> None:
    recorded = expected["padded_batch"]
    images = [pixels_of(name) for name in recorded["file_names"]]
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    pixels = torch.zeros(len(images), 3, height, width, dtype=torch.uint8)
    padding_mask = torch.ones(len(images), height, width, dtype=torch.bool)
    for index, image in enumerate(images):
        pixels[index, :, : image.shape[1], : image.shape[2]] = image
        padding_mask[index, : image.shape[1], : image.shape[2]] = False

    with torch.inference_mode():
        out = model(pixels, padding_mask, keys=KEYS)
    assert torch.equal(out["padding_mask"], recorded["mask"])
    for key in KEYS[1:]:
        for index in range(len(images)):
            assert error(out[key][index], recorded[key][index]) < 1e-5, key
