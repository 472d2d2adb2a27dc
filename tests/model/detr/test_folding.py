from __future__ import annotations

import pytest
import torch
from torch import Tensor

from detr_lightning.model.detr import DETR, Architecture, fold

TRANSFORMER = {"hidden_dim": 32, "encoder_layers": 1, "decoder_layers": 1, "feedforward_dim": 48, "num_queries": 5}
KEYS = ("backbone_features", "encoder_output", "query_embeddings", "pred_logits", "pred_boxes")


@pytest.fixture(
    params=[("basic", (2, 1, 1, 1), False), ("bottleneck", (1, 2, 1, 2), False), ("bottleneck", (1, 1, 1, 2), True)],
    ids=["basic", "bottleneck", "dilated"],
)
def model(request: pytest.FixtureRequest) -> DETR:
    block, blocks, dilation = request.param
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DETR(Architecture(block=block, blocks=blocks, dilation=dilation, **TRANSFORMER))
        for name, tensor in model.backbone.named_buffers():
            if name.endswith(("weight", "running_var")):
                tensor.uniform_(0.5, 1.5)
            else:
                tensor.normal_(0, 0.3)
    return model.eval().requires_grad_(False)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def errors(model: DETR, folded: DETR, images: Tensor) -> list[float]:
    with torch.inference_mode():
        expected, got = model(images, keys=KEYS), folded(images, keys=KEYS)
    return [float((got[key] - expected[key]).norm() / expected[key].norm()) for key in KEYS]


def test_folding_changes_rounding_only(model: DETR, images: Tensor) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = images.clone()
    folded = fold(model)

    assert max(errors(model, folded, images)) < 1e-5
    assert torch.equal(images, given)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_folding_is_exact_in_float64(model: DETR, images: Tensor) -> None:
    assert max(errors(model.double(), fold(model), images.double())) < 1e-12


def test_folded_answers_do_not_depend_on_what_came_before(model: DETR, images: Tensor) -> None:
    folded = fold(model)
    with torch.inference_mode():
        first = folded(images, keys=KEYS)
        folded(images.flip(0), keys=KEYS)
        again = folded(images, keys=KEYS)
    assert all(torch.equal(first[key], again[key]) for key in KEYS)


def test_a_folded_model_shares_no_memory_with_the_original(model: DETR) -> None:
    theirs = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not any(tensor.data_ptr() in theirs for tensor in fold(model).state_dict().values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_on_another_device_nothing_is_left_on_the_cpu(model: DETR, dtype: torch.dtype, padded: bool) -> None:
    # The meta device computes shapes alone and, as a GPU does, refuses tensors of the CPU. It knows no autocast, which
    # the heads switch off: they are left out.
    folded = fold(model).to("meta", dtype)
    pixels = torch.zeros(2, 3, 64, 96, dtype=torch.uint8, device="meta")
    mask = torch.zeros(2, 64, 96, dtype=torch.bool, device="meta") if padded else None
    out = folded(pixels, mask, keys := KEYS[:3])
    assert [(out[key].device.type, out[key].dtype) for key in keys] == [("meta", dtype)] * len(keys)


def test_in_float64_it_is_folded_in_float64(model: DETR, images: Tensor) -> None:
    folded = fold(model, torch.float64)
    assert {parameter.dtype for parameter in folded.parameters()} == {torch.float64}
    assert next(model.parameters()).dtype == torch.float32
    assert max(errors(model.double(), folded, images.double())) < 1e-13
