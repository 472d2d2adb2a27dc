"""The other detectors of the family against transformers' own modules, and the folders that are refused."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_reference import (
    LABELS,
    MODELS,
    SIDES,
    SQUARE,
    attention_of_each_layer,
    build,
    encoder_states,
    last_head,
    reference_outputs,
    save,
)
from PIL import Image
from torch import Tensor, nn

from detr_lightning import DETRExtractor
from detr_lightning.format.keys import KEYS, shape_of
from detr_lightning.model import checkpoints
from detr_lightning.model.detr.transformer import Linear
from detr_lightning.model.family import MODEL_TYPES
from detr_lightning.model.labels import coco_names

STRIDES = {
    "deformable_detr": (8, 16, 32, 64),
    **dict.fromkeys(("rt_detr", "rt_detr_v2", "d_fine", "deimv2"), (8, 16, 32)),
}
"""The strides of the feature maps that the decoder reads, in their order, of the models that have several."""

TWO_STAGE = {"rt_detr", "rt_detr_v2", "d_fine", "deimv2", "rf_detr", "lw_detr"}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """Build one of `MODELS` and the folder it saved itself in, once."""
    built: dict[str, tuple[Any, Path]] = {}

    def get(model_type: str) -> tuple[Any, Path]:
        if model_type not in built:
            model = build(model_type)
            built[model_type] = model, save(model, tmp_path_factory.mktemp(model_type) / "my-model")
        return built[model_type]

    return get


@pytest.fixture
def folder(family: Any, tmp_path: Path) -> Path:
    """A small model that is built fast, free to be changed."""
    return Path(shutil.copytree(family("rf_detr")[1], tmp_path / "my-model"))


def change(folder: Path, file: str = "config.json", **changes: Any) -> str:
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | changes))
    return str(folder)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def smallest_gap(model: Any, pixels: Tensor) -> float:
    """Return the least difference between the scores by which a two-stage model chooses and orders its queries."""
    inner = model.model
    head = inner.enc_score_head if hasattr(inner, "enc_score_head") else inner.enc_out_class_embed[0]
    scores: list[Tensor] = []
    hook = head.register_forward_hook(lambda _m, _a, out: scores.append(out.max(-1).values))
    with torch.no_grad():
        model(pixel_values=pixels)
    hook.remove()
    best = scores[0].topk(model.config.num_queries + 1).values
    return float((best[:, :-1] - best[:, 1:]).min())


@pytest.mark.parametrize("model_type", MODELS)
def test_every_tensor_is_that_of_transformers(family: Any, model_type: str) -> None:
    transformers = pytest.importorskip("transformers")
    theirs, folder = family(model_type)
    checkpoint = checkpoints.load(str(folder))
    extractor = DETRExtractor(str(folder), "all")
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    images = [picture(100, 150, seed) for seed in range(8)]
    assert checkpoint.processor is not None
    size = checkpoint.preprocessing.input_size((100, 150))
    pixels = torch.stack([checkpoint.processor(image, size) for image in images])
    assert torch.equal(pixels, torch.cat([processor(images=i, return_tensors="pt")["pixel_values"] for i in images]))
    expected = [reference_outputs(theirs, one) for one in pixels.split(1)]
    if model_type in TWO_STAGE:
        assert min(smallest_gap(theirs, one) for one in pixels.split(1)) > 1e-4

    with torch.inference_mode():
        alone = extractor(pixels[:1])
        together = extractor(pixels)
        batches = [checkpoint.model(pixels[:size], keys=extractor.keys) for size in (3, 8)]
    architecture = checkpoint.model.architecture
    features = architecture.feature_sizes(size)
    assert set(alone) == set(extractor.keys) == set(expected[0])
    for key in extractor.keys:
        assert torch.equal(alone[key][0], together[key][0]), key
        assert tuple(alone[key][0].shape) == shape_of(key, architecture.shape, features), key
        for index, truth in enumerate(expected):
            assert error(together[key][index], truth[key][0]) <= 1e-5, key
            for batch in batches:
                assert all(error(one, truth[key][0]) <= 1e-5 for one in batch[key][index : index + 1]), key
    assert torch.equal(alone["decoder_output"][:, -1], alone["query_embeddings"])
    if model_type not in ("d_fine", "deimv2"):  # Their logits depend on the predicted box as well.
        assert error(last_head(theirs)(alone["query_embeddings"]), alone["pred_logits"]) <= 1e-5
    for level, stride in enumerate(STRIDES.get(model_type, ())):
        assert features.levels[level] == tuple(-(-side // stride) for side in size)
    assert (checkpoint.family, checkpoint.scoring) == (model_type, MODEL_TYPES[model_type].scoring)
    assert checkpoint.category_names == LABELS


@pytest.mark.parametrize("model_type", ["rf_detr", "lw_detr"])
def test_layers_that_nothing_reads_are_not_computed(family: Any, model_type: str) -> None:
    theirs, folder = family(model_type)
    loaded: Any = checkpoints.load(str(folder)).model
    faster = loaded.for_inference()
    layers = [len(model.model.backbone.backbone.encoder.layer) for model in (theirs, loaded.model, faster.model)]
    assert layers == [3, 3, 2]


@pytest.mark.parametrize("model_type", ["table-transformer", "conditional_detr", "dab-detr", "deformable_detr"])
def test_encoder_layers_and_attention(family: Any, model_type: str) -> None:
    theirs, folder = family(model_type)
    model = checkpoints.load(str(folder)).model
    on_request = [key for key in ("encoder_layers", "cross_attention") if key in model.keys]
    pixels = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        out = model(pixels, keys=(*on_request, "encoder_output", "query_embeddings"))
        again = model(pixels, keys=("query_embeddings",))
    features = model.architecture.feature_sizes((64, 96))
    for key in on_request:
        assert tuple(out[key][0].shape) == shape_of(key, model.architecture.shape, features)
    assert torch.equal(out["encoder_layers"][:, -1], out["encoder_output"])
    assert error(out["query_embeddings"], again["query_embeddings"]) < 1e-6
    assert error(out["encoder_layers"], encoder_states(theirs, pixels)) <= 1e-5
    if "cross_attention" in on_request:
        assert error(out["cross_attention"], attention_of_each_layer(theirs, pixels)) <= 1e-5
        torch.testing.assert_close(out["cross_attention"].sum(-1), torch.ones(out["cross_attention"].shape[:-1]))


def test_every_linear_layer_runs_through_onednn_at_inference(folder: Path) -> None:
    layers = [
        layer for layer in checkpoints.load(str(folder)).model.for_inference().modules() if isinstance(layer, nn.Linear)
    ]
    assert len(layers) > 10
    assert {type(layer) for layer in layers} <= {Linear, nn.modules.linear.NonDynamicallyQuantizableLinear}


def test_keys_that_a_model_lacks_are_refused(folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"my-model, a rf_detr, has no cross_attention. It has backbone_features, .*boxes"
    ):
        DETRExtractor(str(folder), keys=["query_embeddings", "cross_attention"])
    assert set(KEYS) - set(checkpoints.load(str(folder)).model.keys) == {"cross_attention", "encoder_layers"}


def test_settings_that_are_detrs_alone_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"model.nheads, model.dilation and model.ema work only with DETR"):
        checkpoints.load(str(folder), nheads=8)
    with pytest.raises(ValueError, match=r"model.compile works only with DETR"):
        DETRExtractor(str(folder), compile=True)


def test_labels_of_coco_in_order(family: Any, tmp_path: Path) -> None:
    names = dict(enumerate(coco_names().values())) | {3: "motorbike"}
    model = build("rf_detr", id2label=names, label2id={name: number for number, name in names.items()})
    checkpoint = checkpoints.load(str(save(model, tmp_path)))
    assert checkpoint.category_ids == tuple(coco_names())
    assert checkpoint.category_names == dict(enumerate(coco_names().values()))
    assert DETRExtractor(str(tmp_path)).category_names == coco_names()


def test_what_identifies_a_model(folder: Path, family: Any) -> None:
    first = checkpoints.load(str(folder)).sha256
    change(folder, transformers_version="9")
    assert checkpoints.load(str(folder)).sha256 == first
    change(folder, decoder_self_attention_heads=2)
    assert checkpoints.load(str(folder)).sha256 != first


def test_the_page_has_the_sizes_of_the_default_configurations() -> None:
    transformers = pytest.importorskip("transformers")
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    for model_type in ("detr", *MODEL_TYPES):
        config = transformers.CONFIG_MAPPING[model_type]()
        row = next(line for line in page.splitlines() if re.match(rf"\|[^|]*`{model_type}`[^|]*\|.*256", line))
        assert f"`[{config.decoder_layers}, {config.num_queries}, 256]`" in row
        softmax = model_type == "detr" or MODEL_TYPES[model_type].scoring == "softmax"
        assert f"`[{config.num_queries}, {'C+1' if softmax else 'C'}]`" in row
        assert row.endswith("| a rank |") == (model_type in TWO_STAGE)


class TestRefused:
    def test_other_models(self, folder: Path) -> None:
        with pytest.raises(ValueError, match=r"a model of type 'yolos', .*types: detr, table-transformer, .*lw_detr"):
            checkpoints.load(change(folder, model_type="yolos"))
        with pytest.raises(ValueError, match=r"a model of type 'my_own'"):
            checkpoints.load(change(folder, model_type="my_own", auto_map={"AutoConfig": "x--y.Z"}))

    def test_without_its_processor(self, folder: Path) -> None:
        file = folder / "preprocessor_config.json"
        file.write_text("{")
        with pytest.raises(ValueError, match=r"preprocessor_config.json: "):
            checkpoints.load(str(folder))
        file.unlink()
        with pytest.raises(FileNotFoundError, match=r"has no preprocessor_config.json, which a rf_detr needs"):
            checkpoints.load(str(folder))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"do_resize": False}, "do_resize and do_rescale must be true"),
            ({"rescale_factor": 1.0}, "rescale_factor must be 1/255"),
            ({"size": {"max_height": 64, "max_width": 96}}, "size is"),
            ({"size": {"height": 80, "width": 80}}, "does not run on an image of 80x80 pixels .* Check `size`"),
        ],
    )
    def test_a_processor_that_does_not_fit(self, folder: Path, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            checkpoints.load(change(folder, "preprocessor_config.json", **changes))

    def test_a_model_of_few_sizes_whose_processor_leaves_them_open(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("detr_lightning.model.family.PROBE", (80, 80))
        free = change(folder, "preprocessor_config.json", size=SIDES)
        with pytest.raises(ValueError, match=r"does not run on an image of 80x80 pixels .* sets no fixed size"):
            checkpoints.load(free)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"num_queries": 12}, r"does not fit its config, a rf_detr: model\.\S+ is \[18, .*, not \[24"),
            ({"decoder_layers": 4}, r"model\.decoder\.layers\.3\.\S+ is missing"),
            ({"decoder_layers": 2}, r"model\.decoder\.layers\.2\.\S+ is unknown"),
        ],
    )
    def test_weights_that_do_not_fit(self, folder: Path, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            checkpoints.load(change(folder, **changes))

    def test_weights_that_are_not_finite(self, folder: Path) -> None:
        safetensors = pytest.importorskip("safetensors.torch")
        tensors = safetensors.load_file(folder / "model.safetensors")
        tensors["class_embed.bias"][1] = torch.nan
        safetensors.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"has values that are not finite, in class_embed.bias"):
            checkpoints.load(str(folder))

    def test_half_a_download(self, folder: Path) -> None:
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:10_000])
        with pytest.raises(ValueError, match=r"could not be read as a rf_detr: "):
            checkpoints.load(str(folder))
        weights.rename(folder / "pytorch_model.bin")
        with pytest.raises(ValueError, match=r"A rf_detr is read only from safetensors"):
            checkpoints.load(str(folder))
        (folder / "pytorch_model.bin").unlink()
        with pytest.raises(FileNotFoundError, match=r"has a config.json but no weights"):
            checkpoints.load(str(folder))

    def test_a_model_whose_last_layer_does_not_predict(self, folder: Path) -> None:
        with pytest.raises(ValueError, match=r"eval_idx is 1"):
            checkpoints.load(change(folder, eval_idx=1))

    def test_without_transformers(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        transformers = pytest.importorskip("transformers")
        with monkeypatch.context() as patch:
            patch.setattr(transformers, "CONFIG_MAPPING", {})
            with pytest.raises(
                ImportError, match=r"needs transformers 5\S* or later, but .* is installed: pip install"
            ):
                checkpoints.load(str(folder))
        monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(
            ImportError, match=r"A rf_detr needs transformers .*: pip install 'detr-lightning\[family\]'"
        ):
            checkpoints.load(str(folder))

    def test_pixels_that_no_processor_made(self, folder: Path) -> None:
        with pytest.raises(ValueError, match=r"rf_detr takes the pixels of its image processor, not torch.uint8"):
            DETRExtractor(str(folder))(torch.zeros(1, 3, *SQUARE, dtype=torch.uint8))
        mask = torch.zeros(1, *SQUARE, dtype=torch.bool)
        with pytest.raises(ValueError, match=r"data.batching padded works only with DETR"):
            DETRExtractor(str(folder))(torch.zeros(1, 3, *SQUARE), mask)
