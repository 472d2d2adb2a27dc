"""RF-DETR against the package it comes from, and RT-DETR against its repository, where they are at hand.

`pip install rfdetr`; `RT_DETR_CHECKOUT=checkout of github.com/lyuwenyu/RT-DETR`, which holds both versions.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from detr_lightning import DETRExtractor

pytestmark = pytest.mark.filterwarnings("ignore")  # of what others wrote

KEYS = ["query_embeddings", "pred_logits", "pred_boxes"]


def scramble(model: nn.Module, scores: str) -> None:
    """Give every parameter a value of its own; those of the heads named by `scores` spread what they score."""
    generator = torch.Generator().manual_seed(3)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point() or name.endswith(("anchors", "_mask")):
            continue
        tensor.requires_grad_(False)
        if name.endswith("running_var") or (tensor.dim() == 1 and name.endswith("weight")):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.dim() == 1:
            tensor.normal_(0, 0.05, generator=generator)
        elif re.search(scores, name):
            tensor.normal_(0, 3 * tensor.shape[1] ** -0.5, generator=generator)
        elif "bbox" in name:
            tensor.normal_(0, tensor.shape[1] ** -0.5, generator=generator)


def converted(kind: str, state: dict[str, Tensor], folder: Path, side: int, **config: Any) -> Path:
    """Save an original's weights in transformers' layout."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    model, report = getattr(transformers, f"{kind}ForObjectDetection").from_pretrained(
        None, config=getattr(transformers, f"{kind}Config")(**config), state_dict=state, output_loading_info=True
    )
    assert {key for key in report["missing_keys"] if "num_batches_tracked" not in key} == set()
    assert {key for key in report["unexpected_keys"] if "_kp_active_mask" not in key} == set()
    model.save_pretrained(folder)
    processor = getattr(transformers, f"{kind.removesuffix('V2')}ImageProcessor")
    processor(size={"height": side, "width": side}).save_pretrained(folder)
    return folder


def run(model: nn.Module, head: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    """Run an original; what its last score head reads are the query embeddings."""
    seen: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.inference_mode():
        out = model(pixels)
    hook.remove()
    states = [x[-1] if x.dim() == 4 else x for x in seen if x.shape[-2] == out["pred_logits"].shape[-2]]
    return {"query_embeddings": states[-1], "pred_logits": out["pred_logits"], "pred_boxes": out["pred_boxes"]}


def assert_equal(extractor: DETRExtractor, theirs: dict[str, Tensor], pixels: Tensor) -> None:
    with torch.inference_mode():
        ours = extractor(pixels)
    for key in KEYS:
        difference = (ours[key].double() - theirs[key].double()).norm() / theirs[key].double().norm()
        assert difference <= 1e-5, (key, float(difference))


def test_rf_detr_is_that_of_its_package(tmp_path: Path) -> None:
    pytest.importorskip("rfdetr", reason="needs pip install rfdetr", exc_type=ImportError)
    from rfdetr.config import RFDETRNanoConfig
    from rfdetr.models import build_model_from_config
    from transformers import RfDetrConfig

    torch.manual_seed(0)
    theirs = build_model_from_config(RFDETRNanoConfig(pretrain_weights="none.pth", device="cpu")).eval()
    scramble(theirs, "class_embed")
    backbone = RfDetrConfig().backbone_config.to_dict()
    for derived in ("window_block_indexes", "out_indices", "stage_names"):
        backbone.pop(derived, None)
    backbone |= {"patch_size": 16, "image_size": 384, "num_windows": 2}
    backbone |= {"out_features": ["stage3", "stage6", "stage9", "stage12"]}
    settings = {"backbone_config": backbone, "decoder_layers": 2, "decoder_n_points": 2, "num_labels": 91}
    folder = converted("RfDetr", theirs.state_dict(), tmp_path, 384, **settings)

    extractor = DETRExtractor(str(folder), keys=KEYS)
    network: Any = extractor.detr
    for module in network.modules():  # 1e-5 in transformers, for all but one
        if type(module).__name__ == "RfDetrLayerNorm":
            module.eps = 1e-6
    pixels = torch.rand(1, 3, 384, 384, generator=torch.Generator().manual_seed(0))
    assert_equal(extractor, run(theirs, theirs.class_embed, pixels), pixels)


RT_DETR_NAMES = {
    r"^backbone\.conv1\.conv1_(\d)\.": lambda m: f"model.backbone.model.embedder.embedder.{int(m[1]) - 1}.",
    r"^backbone\.res_layers\.(\d)\.blocks\.": r"model.backbone.model.encoder.stages.\1.layers.",
    r"\.branch2([abc])\.": lambda m: f".layer.{'abc'.index(m[1])}.",
    r"\.short\.conv\.(conv|norm)": r".shortcut.1.\1",
    r"\.short\.": ".shortcut.",
    r"^(model\.backbone.*)\.conv\.": r"\1.convolution.",
    r"^(model\.backbone.*)\.norm\.": r"\1.normalization.",
    r"^(en|de)coder\.input_proj\.(\d)\.conv\.": r"model.\1coder_input_proj.\2.0.",
    r"^(en|de)coder\.input_proj\.(\d)\.norm\.": r"model.\1coder_input_proj.\2.1.",
    r"^encoder\.input_proj\.": "model.encoder_input_proj.",  # RT-DETR's first version
    r"^encoder\.encoder\.": "model.encoder.encoder.",
    r"^encoder\.": "model.encoder.",
    r"^(model\.encoder\.encoder.*)\.norm2\.": r"\1.final_layer_norm.",
    r"^decoder\.decoder\.": "model.decoder.",
    r"\.cross_attn\.": ".encoder_attn.",
    r"\.num_points_scale": ".n_points_scale",
    r"\.norm1\.": ".self_attn_layer_norm.",
    r"\.norm2\.": ".encoder_attn_layer_norm.",
    r"\.norm3\.": ".final_layer_norm.",
    r"\.linear([12])\.": r".fc\1.",
    r"^decoder\.dec_score_head\.": "model.decoder.class_embed.",
    r"^decoder\.dec_bbox_head\.": "model.decoder.bbox_embed.",
    r"^decoder\.query_pos_head\.": "model.decoder.query_pos_head.",
    r"^decoder\.enc_output\.proj\.": "model.enc_output.0.",
    r"^decoder\.enc_output\.norm\.": "model.enc_output.1.",
    r"^decoder\.": "model.",
}
"""Names in the repository, and in transformers' folders; applied one after the other."""


def rt_detr_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the repository's weights under the names of transformers' folders."""
    renamed = {}
    for old, tensor in state.items():
        if old.endswith(("anchors", "valid_mask")):
            continue
        new = old
        for pattern, replacement in RT_DETR_NAMES.items():
            new = re.sub(pattern, replacement, new)
        if "in_proj_" in new:
            for part, name in zip(tensor.chunk(3), "qkv", strict=True):
                renamed[new.replace("in_proj_", f"{name}_proj.")] = part
        else:
            renamed[new] = tensor
    return renamed


@pytest.mark.parametrize("version", ["RTDetr", "RTDetrV2"])
def test_rt_detr_is_that_of_its_repository(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout = os.environ.get("RT_DETR_CHECKOUT")
    if not checkout:
        pytest.skip("needs RT_DETR_CHECKOUT, a checkout of github.com/lyuwenyu/RT-DETR")
    part = Path(checkout) / ("rtdetrv2_pytorch" if version == "RTDetrV2" else "rtdetr_pytorch")
    for name in [name for name in sys.modules if name == "src" or name.startswith("src.")]:
        monkeypatch.delitem(sys.modules, name)
    # Without what the packages themselves import: data sets and training, for older releases of torchvision.
    for package in ("src", "src.nn", "src.nn.backbone", "src.zoo", "src.zoo.rtdetr"):
        module = types.ModuleType(package)
        module.__path__ = [str(part.joinpath(*package.split(".")))]
        monkeypatch.setitem(sys.modules, package, module)
    core: Any = types.ModuleType("src.core")
    core.register = lambda *found, **_settings: found[0] if found and callable(found[0]) else lambda made: made
    monkeypatch.setitem(sys.modules, "src.core", core)
    monkeypatch.syspath_prepend(part)
    decoders = {
        "RTDetrV2": ("rtdetrv2_decoder", "RTDETRTransformerv2"),
        "RTDetr": ("rtdetr_decoder", "RTDETRTransformer"),
    }
    file, decoder_class = decoders[version]
    backbone_module, encoder_module, decoder_module, whole = (
        importlib.import_module(f"src.{name}")
        for name in ("nn.backbone.presnet", "zoo.rtdetr.hybrid_encoder", f"zoo.rtdetr.{file}", "zoo.rtdetr.rtdetr")
    )
    from transformers import RTDetrResNetConfig

    torch.manual_seed(0)
    side = 160
    encoder = encoder_module.HybridEncoder([128, 256, 512], hidden_dim=64, nhead=4, dim_feedforward=96, expansion=0.5)
    decoder = getattr(decoder_module, decoder_class)(
        num_classes=80,
        hidden_dim=64,
        num_queries=30,
        feat_channels=[64, 64, 64],
        nhead=4,
        dim_feedforward=96,
        num_denoising=10,
        **{"num_layers" if version == "RTDetrV2" else "num_decoder_layers": 3},
    )
    theirs = whole.RTDETR(backbone_module.PResNet(18, return_idx=[1, 2, 3]), encoder, decoder).eval()
    scramble(theirs, "score_head")
    body = RTDetrResNetConfig(
        hidden_sizes=[64, 128, 256, 512],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    settings = {
        "backbone_config": body,
        "encoder_hidden_dim": 64,
        "encoder_in_channels": [128, 256, 512],
        "encoder_ffn_dim": 96,
        "encoder_attention_heads": 4,
        "hidden_expansion": 0.5,
        "d_model": 64,
        "num_queries": 30,
        "decoder_in_channels": [64, 64, 64],
        "decoder_ffn_dim": 96,
        "decoder_layers": 3,
        "decoder_attention_heads": 4,
        "num_denoising": 10,
        "num_labels": 80,
    }
    folder = converted(version, rt_detr_state(theirs.state_dict()), tmp_path, side, **settings)
    extractor = DETRExtractor(str(folder), keys=KEYS)
    pixels = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    assert_equal(extractor, run(theirs, decoder.dec_score_head[-1], pixels), pixels)
