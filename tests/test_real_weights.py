"""The official DETR-R50 itself, where its weights and one COCO image are at hand: nothing is downloaded here.

Run `python cli.py predict --config configs/decoder.yaml --data.limit 1 --data.download true` once, and this test checks
your machine against the numbers that Hugging Face publishes for the same weights.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from detr_lightning.model.detr.official import OFFICIAL

WEIGHTS = Path(torch.hub.get_dir()) / "checkpoints" / OFFICIAL["detr_resnet50"].file
IMAGE = Path(__file__).resolve().parents[1] / "data" / "coco" / "val2017" / "000000039769.jpg"
# transformers, tests/models/detr/test_modeling_detr.py: the last hidden state of facebook/detr-resnet-50 on this image.
PUBLISHED = torch.tensor([0.0616, -0.5146, -0.4032])


@pytest.mark.skipif(not WEIGHTS.is_file(), reason=f"the official weights are not at {WEIGHTS}")
@pytest.mark.skipif(not IMAGE.is_file(), reason=f"COCO val2017 is not at {IMAGE.parent}")
def test_the_official_weights_give_the_published_numbers() -> None:
    from detr_lightning import extract

    embeddings = extract(IMAGE, weights="detr_resnet50", progress=False)
    assert isinstance(embeddings, dict)
    torch.testing.assert_close(embeddings[1]["query_embeddings"][0, :3], PUBLISHED, atol=2e-4, rtol=0)
