"""DETR against Hugging Face's, tensor by tensor, through the files that Hugging Face writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hugging_face_reference import reference_outputs
from torch import Tensor

from detr_lightning.format.keys import KEYS
from detr_lightning.model import checkpoints

SHAPES = [(128, 160), (96, 224)]
PADDED = "padded"
CASES = [
    *((name, case) for name in ("r18", "small-no-timm") for case in (*SHAPES, PADDED)),
    *(("r50-dc5", case) for case in (SHAPES[1], PADDED)),
    ("r50", SHAPES[0]),
    ("r50-no-timm", SHAPES[1]),
    ("r101", PADDED),
    ("learned", SHAPES[0]),
    ("learned", PADDED),
    ("pre-norm", SHAPES[0]),
    ("pre-norm", PADDED),
]


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def pictures(case: tuple[int, int] | str) -> tuple[Tensor, Tensor | None]:
    """Normalised images with large structures, or two of them padded to one size."""
    generator = torch.Generator().manual_seed(3)

    def picture(height: int, width: int) -> Tensor:
        coarse = torch.randn(1, 3, height // 16, width // 16, generator=generator)
        return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")

    if not isinstance(case, str):
        return picture(*case), None
    images, padding_mask = torch.zeros(2, 3, 136, 192), torch.ones(2, 136, 192, dtype=torch.bool)
    for index, (height, width) in enumerate([(136, 112), (80, 192)]):
        images[index, :, :height, :width] = picture(height, width)
        padding_mask[index, :height, :width] = False
    return images, padding_mask


@pytest.mark.parametrize(("name", "case"), CASES, ids=str)
def test_every_tensor_equals_hugging_faces(
    reference: Any, name: str, case: tuple[int, int] | str, tmp_path: Path
) -> None:
    theirs, folder = reference(name)
    if name == "pre-norm":  # by this name transformers has it only as Table Transformer
        torch.save(theirs.float().state_dict(), tmp_path / "detr.pth")
        model = checkpoints.load(str(tmp_path / "detr.pth"), nheads=4).model
        assert model.architecture.pre_norm
    else:
        model = checkpoints.load(str(folder)).model
    images, padding_mask = pictures(case)

    single = reference_outputs(theirs.float(), images, padding_mask)
    expected = reference_outputs(theirs.double(), images.double(), padding_mask)
    with torch.inference_mode():
        got = model(images, padding_mask, keys=KEYS)
        got_double = model.double()(images.double(), padding_mask, keys=KEYS)

    for key in KEYS:
        assert got[key].shape == expected[key].shape
        for index in range(len(images)):
            truth = expected[key][index]
            rounding = error(single[key][index], truth)
            assert error(got_double[key][index], truth) <= 2e-6, key  # theirs has float32 positions
            assert error(got[key][index], truth) <= max(1e-5, 2 * rounding), key
    assert torch.equal(got["decoder_output"][:, -1], got["query_embeddings"])


def test_the_reference_is_hard_to_agree_with_by_chance(reference: Any) -> None:
    images, _ = pictures(SHAPES[0])
    out = reference_outputs(reference("r50").model.float(), images)

    attention = out["cross_attention"][0]
    assert attention.amax(-1).mean() > 4 / attention.shape[-1]
    queries = out["query_embeddings"][0]
    assert (torch.pdist(queries) / queries.norm(dim=-1).mean()).min() > 0.1
    assert out["pred_boxes"][0].std(0).min() > 0.01
