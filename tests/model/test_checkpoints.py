from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil
import sys
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from coco_factory import Coco
from torch import Tensor

from detr_lightning import EmbeddingStore, extract
from detr_lightning.errors import InputError, MissingPackageError
from detr_lightning.format.preprocessing import Preprocessing
from detr_lightning.model import checkpoints
from detr_lightning.model.detr import DETR, Architecture
from detr_lightning.model.detr.official import OFFICIAL, Official

TINY = Architecture("bottleneck", (1, 2, 1, 1), 32, 8, 1, 2, 48, 5, 7)
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    """The tensors of a tiny DETR, exact in bfloat16."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {name: tensor.detach().bfloat16().float() for name, tensor in DETR(TINY).state_dict().items()}


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., str]:
    def save(content: Any, name: str = "detr.pth", **options: Any) -> str:
        torch.save(content, tmp_path / name, **options)
        return str(tmp_path / name)

    return save


class TestOfficialLayout:
    @pytest.mark.parametrize(
        "layout",
        [
            "published",
            "state_dict",
            "training",
            "panoptic",
            "distributed",
            "half",
            "bfloat16",
            "old format",
            "counters",
        ],
    )
    def test_is_read(self, state: State, save: Callable[..., str], layout: str) -> None:
        if layout == "state_dict":
            path = save(state)
        elif layout == "training":
            rest = {"optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]}, "epoch": 3}
            path = save({"model": state, **rest, "args": Namespace(nheads=8, dilation=False, lr=1e-4, masks=False)})
        elif layout == "panoptic":
            mask_head = {"mask_head.lay1.weight": torch.ones(2), "bbox_attention.q_linear.weight": torch.ones(2)}
            path = save({"model": {f"detr.{name}": tensor for name, tensor in state.items()} | mask_head})
        elif layout == "distributed":
            path = save({"model": {f"module.{name}": tensor for name, tensor in state.items()}})
        elif layout in ("half", "bfloat16"):
            dtype = getattr(torch, layout)
            state = {name: tensor.to(dtype) for name, tensor in state.items()}
            path = save({"model": state})
        elif layout == "counters":
            path = save({"model": state | {"backbone.0.body.bn1.num_batches_tracked": torch.tensor(3)}})
        else:
            path = save({"model": state}, _use_new_zipfile_serialization=layout != "old format")

        checkpoint = checkpoints.load(path)
        assert checkpoint.model.architecture == TINY
        assert checkpoint.name == "detr.pth"
        assert checkpoint.sha256 == hashlib.sha256(Path(path).read_bytes()).hexdigest()
        loaded = checkpoint.model.state_dict()
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in state.items())
        assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}
        assert not checkpoint.model.training
        assert not any(parameter.requires_grad for parameter in checkpoint.model.parameters())

    def test_the_model_outlives_its_file(self, state: State, save: Callable[..., str]) -> None:
        path = save({"model": state})
        model = checkpoints.load(path).model
        Path(path).write_bytes(b"")
        assert torch.equal(model.state_dict()["query_embed.weight"], state["query_embed.weight"])


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def halved(state: State) -> State:
    return {name: tensor * 0.5 for name, tensor in state.items()}


class TestContainers:
    """What wraps the model's tensors in the checkpoints of other people's training."""

    @pytest.mark.parametrize("key", [None, "model", "state_dict", "model_state_dict"])
    @pytest.mark.parametrize(
        "prefix", ["", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "net.detr."]
    )
    def test_containers_and_prefixes(
        self, state: State, save: Callable[..., str], key: str | None, prefix: str
    ) -> None:
        content = prefixed(state, prefix)
        assert_same(checkpoints.load(save({key: content, "epoch": 3} if key else content)), state)

    def test_a_compiled_part(self, state: State, save: Callable[..., str]) -> None:
        compiled = {name.replace("transformer.", "transformer._orig_mod."): tensor for name, tensor in state.items()}
        assert_same(checkpoints.load(save({"model": compiled})), state)

    def test_a_lightning_checkpoint(self, state: State, save: Callable[..., str]) -> None:
        rest = {"epoch": 1, "global_step": 2, "pytorch-lightning_version": "2.1.0", "loops": {}, "callbacks": {}}
        content = prefixed(state, "model.") | {"criterion.empty_weight": torch.ones(3)}
        path = save({"state_dict": content, "hyper_parameters": {"nheads": 4, "lr": 1e-4}, **rest}, "last.ckpt")
        checkpoint = checkpoints.load(path)
        assert_same(checkpoint, state)
        assert checkpoint.model.architecture.nheads == 4

    @pytest.mark.parametrize("prefix", ["", "model.", "model._orig_mod."])
    def test_hugging_face_names(self, reference: Any, save: Callable[..., str], prefix: str) -> None:
        expected = checkpoints.load(str(reference("small-no-timm").folder)).model.state_dict()
        content = prefixed(reference("small-no-timm").model.float().state_dict(), prefix)
        assert_same(checkpoints.load(save({"state_dict": content}), nheads=4), expected)

    @pytest.mark.parametrize(
        "averages",
        [
            lambda state: {"ema": state},
            lambda state: {"model_ema": prefixed(state, "module.")},
            lambda state: {"ema": {"module": state, "updates": 3}},
        ],
    )
    def test_averaged_weights(self, state: State, save: Callable[..., str], averages: Callable[[State], Any]) -> None:
        alone = checkpoints.load(save(averages(state), "alone.pth"))
        assert_same(alone, state)
        assert re.search(r"EMA weights from '\w+', the only ones$", alone.notes)
        path = save({"model": halved(state), **averages(state)})
        without, chosen = checkpoints.load(path), checkpoints.load(path, ema=True)
        assert_same(without, halved(state))
        assert re.search(r"not the EMA weights in '\w+' \(model.ema=true\)$", without.notes)
        assert_same(chosen, state)
        assert re.search(r"EMA weights from '\w+'$", chosen.notes)
        assert without.sha256 != chosen.sha256

    def test_averaged_weights_within_a_state_dict(self, state: State, save: Callable[..., str]) -> None:
        path = save({"state_dict": prefixed(halved(state), "model.") | prefixed(state, "ema_model.module.")})
        assert_same(checkpoints.load(path), halved(state))
        assert_same(checkpoints.load(path, ema=True), state)

    @pytest.mark.parametrize(
        ("own", "average"),
        [("model.", "model.ema."), ("model.model.", "model.ema."), ("detr.model.", "detr.ema.")],
    )
    def test_averaged_weights_below_the_same_prefix(
        self, state: State, save: Callable[..., str], own: str, average: str
    ) -> None:
        path = save({"state_dict": prefixed(halved(state), own) | prefixed(state, average)})
        for ema in (None, False):
            checkpoint = checkpoints.load(path, ema=ema)
            assert_same(checkpoint, halved(state))
            assert f"not the EMA weights in {average.rstrip('.')!r}" in checkpoint.notes
        assert_same(checkpoints.load(path, ema=True), state)

    def test_the_averaged_model_of_torch(self, state: State, save: Callable[..., str]) -> None:
        model = DETR(TINY)
        model.load_state_dict(state)
        average = torch.optim.swa_utils.AveragedModel(model).state_dict()
        for content in (average, {"model": average}):
            assert_same(checkpoints.load(save(content)), state)
        path = save({"model": halved(state), "model_ema": average})
        assert_same(checkpoints.load(path), halved(state))
        assert_same(checkpoints.load(path, ema=True), state)
        lightning = prefixed(halved(state), "model.") | prefixed(average, "ema_model.")
        assert_same(checkpoints.load(save({"state_dict": lightning}), ema=True), state)

    def test_several_detrs_are_refused(self, state: State, save: Callable[..., str]) -> None:
        path = save({"model": prefixed(state, "student.") | prefixed(halved(state), "teacher.")})
        with pytest.raises(InputError, match=r"contains several DETRs, with the prefixes 'student.', 'teacher.'"):
            checkpoints.load(path)

    @pytest.mark.parametrize(
        "settings",
        [
            {"hyper_parameters": {"args": Namespace(nheads=4, dilation=0)}},
            {"hyper_parameters": {"model": {"nheads": 4, "dilation": False}, "lr": 1e-4}},
            {"hyper_parameters": {"config": Namespace(model={"nheads": 4, "dilation": 0})}},
        ],
    )
    def test_settings_in_a_group(self, state: State, save: Callable[..., str], settings: dict[str, Any]) -> None:
        checkpoint = checkpoints.load(save({"state_dict": prefixed(state, "model."), **settings}))
        assert checkpoint.model.architecture.nheads == 4
        assert "not dilated (from its" in checkpoint.notes

    def test_settings_that_contain_themselves(self, state: State, save: Callable[..., str]) -> None:
        settings: dict[str, Any] = {"dilation": [0, 1]}
        settings["args"] = settings
        checkpoint = checkpoints.load(save({"model": state, "hyper_parameters": settings}), nheads=4)
        assert "not dilated (the default: not stated in the file)" in checkpoint.notes

    def test_averaged_weights_that_are_not_there(self, state: State, save: Callable[..., str]) -> None:
        with pytest.raises(ValueError, match=r"has no averaged \(EMA\) weights. Leave model.ema out"):
            checkpoints.load(save({"model": state}), ema=True)
        with pytest.raises(ValueError, match=r"has only averaged"):
            checkpoints.load(save({"ema": state}), ema=False)

    def test_what_lies_beside_the_weights(self, state: State, save: Callable[..., str]) -> None:
        beside = {"best": np.float64(0.4), "args": Namespace(nheads=4, mean=np.float32(0.5), output_dir=Path("out"))}
        checkpoint = checkpoints.load(save({"model": state, **beside}))
        assert_same(checkpoint, state)
        assert checkpoint.model.architecture.nheads == 4

    @pytest.mark.parametrize(
        ("names", "kind"),
        [
            (["bbox_head.fc_cls.weight", "backbone.conv1.weight"], "an MMDetection model"),
            (["linear_class.weight", "row_embed"], "the small DETR of the paper's notebook"),
            (["model.0.conv.weight"], "an Ultralytics YOLO"),
            (["decoder.enc_score_head.weight"], "an RT-DETR or a D-FINE"),
            (["backbone.0.encoder.encoder.x", "refpoint_embed.weight"], "an RF-DETR or an LW-DETR"),
            (["layer1.0.conv1.weight", "fc.weight"], "only a backbone"),
        ],
    )
    def test_other_models_are_named(self, save: Callable[..., str], names: list[str], kind: str) -> None:
        with pytest.raises(ValueError, match=rf"detr.pth looks like {kind}.*: it has the tensor {re.escape(names[0])}"):
            checkpoints.load(save({"model": dict.fromkeys(names, torch.ones(2, 2))}))

    def test_other_formats_are_named(self, tmp_path: Path) -> None:
        path = tmp_path / "detr.pth"
        path.write_bytes(b"\x08\x07\x12\x07pytorch\x1a\x05" + bytes(300))
        with pytest.raises(ValueError, match=r"detr.pth is an ONNX model"):
            checkpoints.load(str(path))
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x/constants.pkl", b"")
        with pytest.raises(ValueError, match=r"detr.pth is a TorchScript program"):
            checkpoints.load(str(path))


def assert_same(checkpoint: checkpoints.Checkpoint, state: State) -> None:
    loaded = checkpoint.model.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


class TestWhatTensorsDoNotTell:
    def test_defaults_are_said(self, state: State, save: Callable[..., str]) -> None:
        notes = checkpoints.load(save(state)).notes
        assert notes == (
            "DETR-R17: 8 heads (the default: not stated in the file), not dilated (the default: not stated in the file)"
        )

    @pytest.mark.parametrize("args", [Namespace(nheads=4, dilation=True), {"nheads": 4, "dilation": True}])
    def test_args_tell(self, state: State, save: Callable[..., str], args: Any) -> None:
        checkpoint = checkpoints.load(save({"model": state, "args": args}), nheads=4)
        assert (checkpoint.model.architecture.nheads, checkpoint.model.architecture.dilation) == (4, True)
        assert checkpoint.notes == "DETR-R17-DC5: 4 heads (from its args), dilated (from its args)"

    def test_the_user_tells(self, state: State, save: Callable[..., str]) -> None:
        checkpoint = checkpoints.load(save(state), nheads=2, dilation=True)
        assert checkpoint.notes == "DETR-R17-DC5: 2 heads (as given), dilated (as given)"

    def test_a_known_file_is_recognised_under_any_name(
        self, state: State, save: Callable[..., str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = save({"model": state}, "renamed.pth")
        prefix = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]
        monkeypatch.setitem(OFFICIAL, "detr_resnet50_dc5", Official("x.pth", prefix, dilation=True))
        assert checkpoints.load(path).notes == (
            "DETR-R17-DC5: 8 heads (known by its sha256), dilated (known by its sha256)"
        )
        with pytest.raises(ValueError, match=r"model.dilation is False, but renamed.pth has dilation True \(known by"):
            checkpoints.load(path, dilation=False)

    def test_contradictions_are_refused(self, state: State, save: Callable[..., str]) -> None:
        path = save({"model": state, "args": Namespace(nheads=4, dilation=False)})
        with pytest.raises(ValueError, match=r"model.nheads is 8, but detr.pth has nheads 4 \(from its args\)"):
            checkpoints.load(path, nheads=8)
        with pytest.raises(ValueError, match=r"model.dilation is True, but detr.pth has dilation False"):
            checkpoints.load(path, dilation=True)

    @pytest.mark.parametrize("nheads", [0, -8, 5])
    def test_heads_divide_the_width(self, state: State, save: Callable[..., str], nheads: int) -> None:
        with pytest.raises(ValueError, match=rf"model.nheads is {nheads}, which does not divide .* width of 32"):
            checkpoints.load(save(state), nheads=nheads)
        with pytest.raises(ValueError, match=rf"model.nheads is {nheads}, which does not divide .* width of 256"):
            checkpoints.load("random", nheads=nheads)


class TestRefused:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"input_proj.bias": None}, r"detr.pth does not fit a DETR-R17: input_proj.bias is missing\."),
            ({"input_proj.extra": torch.ones(1)}, r"input_proj.extra is unknown\."),
            ({"input_proj.bias": torch.ones(3)}, r"input_proj.bias is \[3\], not \[32\]\."),
            (
                {"transformer.decoder.norm.weight": None, "bbox_embed.layers.0.bias": None},
                r"norm.weight is missing; bbox",
            ),
            ({"query_embed.weight": None}, r"not a DETR: query_embed.weight is missing"),
            ({"class_embed.weight": torch.ones(3)}, r"not a DETR: class_embed.weight is misshaped"),
            ({"transformer.level_embed": torch.ones(4, 32)}, r"looks like a Deformable DETR"),
            ({"transformer.encoder.norm.weight": torch.ones(32)}, r"transformer.encoder.norm.bias is missing"),
            ({"backbone.1.row_embed.weight": torch.ones(50, 16)}, r"backbone.1.col_embed.weight is missing"),
            (
                {"transformer.decoder.norm.bias": torch.full((32,), torch.nan)},
                r"detr.pth has values that are not finite, in transformer.decoder.norm.bias",
            ),
        ],
    )
    def test_tensors_that_do_not_fit(
        self, state: State, save: Callable[..., str], change: dict[str, Tensor | None], message: str
    ) -> None:
        changed = {name: tensor for name, tensor in (state | change).items() if tensor is not None}
        with pytest.raises(ValueError, match=message):
            checkpoints.load(save({"model": changed}))

    def test_many_misfits_are_counted(self, state: State, save: Callable[..., str]) -> None:
        changed = {
            name: tensor for name, tensor in state.items() if "decoder.layers.1." not in name or "linear" in name
        }
        with pytest.raises(ValueError, match=r"is missing; .* is missing, and \d+ more\."):
            checkpoints.load(save(changed))

    @pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"model": [1]}, {}], ids=str)
    def test_files_without_weights(self, save: Callable[..., str], content: Any) -> None:
        with pytest.raises(ValueError, match=r"detr.pth contains .*Expected {'model': state_dict} or a state_dict"):
            checkpoints.load(save(content))

    @pytest.mark.parametrize("damage", ["empty", "text", "cut off", "cut off, old format"])
    def test_files_that_are_not_whole(self, state: State, save: Callable[..., str], damage: str) -> None:
        path = Path(save({"model": state}, _use_new_zipfile_serialization="old" not in damage))
        if damage == "text":
            path.write_text("<!DOCTYPE html><title>404</title>")
        else:
            path.write_bytes(path.read_bytes()[: 0 if damage == "empty" else 100_000])
        with pytest.raises(ValueError, match=r"detr.pth is not a complete weight file"):
            checkpoints.load(str(path))

    @pytest.mark.parametrize("new_format", [True, False])
    def test_files_that_would_run_code(self, tmp_path: Path, save: Callable[..., str], new_format: bool) -> None:
        path = save({"model": Malicious(tmp_path / "ran")}, _use_new_zipfile_serialization=new_format)
        with pytest.raises(ValueError, match=r"detr.pth was refused: reading it would run \S*open.* No code was run"):
            checkpoints.load(path)
        assert not (tmp_path / "ran").exists()

    def test_plain_pickles_run_nothing_either(self, tmp_path: Path) -> None:
        path = tmp_path / "detr.pth"
        path.write_bytes(pickle.dumps({"model": Malicious(tmp_path / "ran")}))
        with pytest.raises(ValueError, match=r"detr.pth"):
            checkpoints.load(str(path))
        assert not (tmp_path / "ran").exists()

    def test_a_safetensors_file_without_its_config(self, tmp_path: Path) -> None:
        (tmp_path / "model.safetensors").write_bytes(b"")
        with pytest.raises(ValueError, match=r"Give the folder"):
            checkpoints.load(str(tmp_path / "model.safetensors"))

    @pytest.mark.parametrize("path", ["missing.pth", "./missing", "/no/such/folder", "~/no such folder"])
    def test_missing_paths(self, path: str) -> None:
        with pytest.raises(FileNotFoundError, match=rf"model.weights: the file or folder '{path}' does not exist"):
            checkpoints.load(path)

    def test_unknown_names(self) -> None:
        with pytest.raises(
            ValueError, match=r"(?s)'detr_resnet5O', .*random.* Did you mean 'detr_resnet50'\?"
        ) as error:
            checkpoints.load("detr_resnet5O")
        assert "\n" not in str(error.value)


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


class TestRandom:
    def test_it_is_the_official_detr_r50_and_always_the_same(self) -> None:
        before = torch.get_rng_state()
        first, again = checkpoints.load("random"), checkpoints.load("random", dilation=True)
        assert torch.equal(torch.get_rng_state(), before)
        assert first.model.architecture == Architecture()
        assert again.model.architecture == Architecture(dilation=True)
        assert first.sha256 == again.sha256
        assert first.notes == "DETR-R50: random weights (seed 0), 8 heads"
        assert first.name == "random"
        theirs = again.model.state_dict()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in first.model.state_dict().items())

    def test_queries_and_images_can_be_told_apart(self) -> None:
        model = checkpoints.load("random").model
        pixels = torch.randint(256, (2, 3, 96, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        pixels[1, :, :, 64:] = 0
        with torch.inference_mode():
            embeddings = model(pixels)["query_embeddings"]
        length = embeddings.norm(dim=-1).mean()
        assert torch.pdist(embeddings[0]).min() > 0.02 * length
        assert (embeddings[0] - embeddings[1]).norm(dim=-1).min() > 0.02 * length


@pytest.fixture
def folder(reference: Any, tmp_path: Path) -> Path:
    """A small DETR as Hugging Face saves it, free to be changed."""
    return Path(shutil.copytree(reference("small-no-timm").folder, tmp_path / "my-detr"))


@pytest.fixture
def timm_folder(reference: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(reference("r18").folder, tmp_path / "my-detr"))


def change(folder: Path, **config: Any) -> str:
    content = json.loads((folder / "config.json").read_text())
    for key, value in config.items():
        *parents, last = key.split("__")
        inner = content
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
    (folder / "config.json").write_text(json.dumps(content))
    return str(folder)


class TestHuggingFace:
    """That the numbers are right is shown by the parity tests."""

    def test_folder(self, folder: Path) -> None:
        checkpoint = checkpoints.load(str(folder))
        assert checkpoint.name == "my-detr"
        assert checkpoint.notes == "DETR-R12: 4 heads (from its config.json), not dilated (from its config.json)"
        assert checkpoint.model.architecture == Architecture("basic", (1, 2, 1, 1), 32, 4, 2, 3, 48, 9, 6)
        assert checkpoint.sha256 == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()

    def test_names_and_preprocessing(self, folder: Path) -> None:
        plain = checkpoints.load(str(folder))
        assert (plain.category_names, plain.category_ids, plain.preprocessing) == (
            None,
            (0, 1, 2, 3, 4),
            Preprocessing(),
        )
        change(folder, id2label={"0": "cat", "1": "dog"})
        (folder / "preprocessor_config.json").write_text(
            json.dumps(
                {
                    "size": {"shortest_edge": 480, "longest_edge": 600},
                    "image_mean": [0.5, 0.4, 0.3],
                    "image_std": [0.2, 0.3, 0.5],
                }
            )
        )
        checkpoint = checkpoints.load(str(folder))
        assert (checkpoint.category_names, checkpoint.category_ids) == ({0: "cat", 1: "dog"}, None)
        assert checkpoint.preprocessing == Preprocessing(480, 600, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.5))
        pixels = torch.randint(256, (1, 3, 40, 60), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        mean, std = torch.tensor([0.5, 0.4, 0.3])[:, None, None], torch.tensor([0.2, 0.3, 0.5])[:, None, None]
        with torch.inference_mode():
            expected = plain.model((pixels / 255 - mean) / std)["pred_logits"]
            torch.testing.assert_close(checkpoint.model(pixels)["pred_logits"], expected)
            assert not torch.allclose(plain.model(pixels)["pred_logits"], expected, rtol=1e-3)

    @pytest.mark.parametrize(
        ("config", "expected"),
        [
            ({}, Preprocessing()),
            ({"size": 480, "max_size": 600}, Preprocessing(480, 600)),
            ({"size": {"shortest_edge": 480}}, Preprocessing(480, None)),
            ({"size": {"height": 64, "width": 96}}, Preprocessing(None, None, 64, 96)),
            ({"do_normalize": False}, Preprocessing(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))),
            ({"size": {"max_height": 64, "max_width": 96}}, r"preprocessor_config.json: size is .*max_height"),
            ({"size": {"shortest_edge": 0}}, r"must be at least 1"),
            ({"size": "large"}, r"preprocessor_config.json: "),
            ({"rescale_factor": 1}, r"rescale_factor is 1"),
            ({"resample": 3}, r"resample is 3"),
            ({"do_resize": False}, r"do_resize is False"),
            ({"image_std": [0.5, 0.5]}, r"both need three values"),
            ({"image_std": None, "size": None}, Preprocessing()),
            ({"image_std": 1}, r"preprocessor_config.json: a value has the wrong type"),
            ({"size": [96, 96]}, r"size is \[96, 96\], but must be height and width"),
            ({"pad_size": {"height": 96, "width": 96}}, r"pad_size is .* but only None is supported"),
            ([], r"preprocessor_config.json contains a list"),
        ],
    )
    def test_preprocessor_configs(self, folder: Path, config: Any, expected: Preprocessing | str) -> None:
        (folder / "preprocessor_config.json").write_text(json.dumps(config))
        if isinstance(expected, Preprocessing):
            assert checkpoints.load(str(folder)).preprocessing == expected
        else:
            with pytest.raises(ValueError, match=expected):
                checkpoints.load(str(folder))

    def test_a_processor_config_is_read_too(self, folder: Path) -> None:
        settings = {"image_processor": {"size": {"height": 96, "width": 64}}, "processor_class": "DetrProcessor"}
        (folder / "processor_config.json").write_text(json.dumps(settings))
        assert checkpoints.load(str(folder)).preprocessing == Preprocessing(None, None, 96, 64)

    def test_another_fixed_size_is_refused(self, folder: Path, coco_folder: Coco, tmp_path: Path) -> None:
        def run(height: int, width: int) -> EmbeddingStore:
            config = {"size": {"height": height, "width": width}}
            (folder / "preprocessor_config.json").write_text(json.dumps(config))
            return extract(coco_folder.images, weights=folder, output_dir=tmp_path / "out", progress=False)

        preprocessing = run(96, 64).metadata["preprocessing"]
        assert (preprocessing["height"], preprocessing["width"]) == (96, 64)
        with pytest.raises(InputError, match=r"height was 96, now 64; .*width was 64, now 96"):
            run(64, 96)

    def test_more_names_than_logits(self, folder: Path) -> None:
        logits = checkpoints.load(str(folder)).model.architecture.num_logits
        names = {str(number): f"kind {number}" for number in range(logits)}
        found = checkpoints.load(change(folder, id2label=names))
        assert found.category_names is not None
        assert max(found.category_names) == logits - 2  # The last logit is "no object".
        names[str(logits)] = "one too many"
        with pytest.raises(InputError, match=rf"names categories up to the number {logits}, .* have {logits} logits"):
            checkpoints.load(change(folder, id2label=names))

    def test_folders_that_are_something_else(self, folder: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"has no config.json.* Its subfolder my-detr has one"):
            checkpoints.load(str(folder.parent))
        (folder / "config.json").rename(folder / "adapter_config.json")
        with pytest.raises(FileNotFoundError, match=r"It is an adapter \(LoRA\)"):
            checkpoints.load(str(folder))

    def test_a_shard_that_is_gone(self, folder: Path) -> None:
        index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(FileNotFoundError, match=r"lists model-00002-of-00002.safetensors, which does not exist"):
            checkpoints.load(str(folder))
        for damaged in ({}, {"weight_map": None}, {"weight_map": {"a": 3}}):
            (folder / "model.safetensors.index.json").write_text(json.dumps(damaged))
            with pytest.raises(InputError, match=r"model.safetensors.index.json has no weight_map"):
                checkpoints.load(str(folder))

    def test_averaged_weights_are_no_choice_of_a_folder(self, folder: Path) -> None:
        with pytest.raises(ValueError, match=r"model.ema works only with a weight file"):
            checkpoints.load(str(folder), ema=True)

    def test_other_ways_to_store_the_same(self, folder: Path, reference: Any) -> None:
        expected = checkpoints.load(str(folder)).model.state_dict()

        def same() -> bool:
            tensors = checkpoints.load(str(folder)).model.state_dict()
            return all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())

        (folder / "model.safetensors").unlink()
        model = reference("small-no-timm").model.float()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")  # with the names of Transformers' memory
        assert same()
        torch.save(
            {f"detr.{name}": tensor for name, tensor in model.state_dict().items()}, folder / "pytorch_model.bin"
        )
        assert same()
        (folder / "pytorch_model.bin").unlink()
        lightning = {f"model.{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}
        safetensors.torch.save_file(lightning, folder / "model.safetensors")
        assert same()
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="5MB")
        assert len(list(folder.glob("model-*.safetensors"))) > 1
        assert same()

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"activation_function": "gelu"}, r"activation_function is 'gelu'"),
            ({"position_embedding_type": "rotary"}, r"position_embedding_type is 'rotary'"),
            ({"decoder_attention_heads": 8}, r"decoder_attention_heads is 8, but only 4"),
            ({"dilation": True}, r"dilation is True"),
            ({"backbone_config__hidden_act": "gelu"}, r"hidden_act is 'gelu'"),
            ({"backbone_config__downsample_in_first_stage": True}, r"downsample_in_first_stage is True"),
            ({"backbone_config__model_type": "swin"}, r"backbone_config.model_type is 'swin'"),
        ],
    )
    def test_other_models_are_refused(self, folder: Path, config: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=rf"config.json: \S*{message}"):
            checkpoints.load(change(folder, **config))

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"backbone_config__backbone": "resnet50d"}, r"backbone is 'resnet50d'"),
            ({"backbone_config__output_stride": 8}, r"output_stride is 8"),
            ({"dilation": True}, r"output_stride is 32 and dilation is True"),
        ],
    )
    def test_other_timm_backbones_are_refused(self, timm_folder: Path, config: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=rf"config.json: {message}"):
            checkpoints.load(change(timm_folder, **config))

    def test_configs_of_older_versions(self, timm_folder: Path) -> None:
        path = change(timm_folder, backbone_config=None, backbone="resnet18", use_timm_backbone=True)
        assert not checkpoints.load(path).model.architecture.dilation
        with pytest.raises(ValueError, match=r"my-detr has dilation False \(from its config.json\)"):
            checkpoints.load(path, dilation=True)
        change(timm_folder, dilation=True)
        with pytest.raises(ValueError, match=r"only ResNets with bottleneck blocks.* This is a DETR-R18\."):
            checkpoints.load(path)

    def test_damage(self, folder: Path) -> None:
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:100_000])
        with pytest.raises(ValueError, match=r"model.safetensors is not a complete safetensors file"):
            checkpoints.load(str(folder))
        weights.unlink()
        with pytest.raises(FileNotFoundError, match=r"my-detr has a config.json but no weights. Expected one of model"):
            checkpoints.load(str(folder))
        (folder / "config.json").write_text("{")
        with pytest.raises(ValueError, match=r"config.json: "):
            checkpoints.load(str(folder))
        (folder / "config.json").unlink()
        with pytest.raises(FileNotFoundError, match=r"my-detr has no config.json"):
            checkpoints.load(str(folder))

    def test_hub(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        huggingface_hub = pytest.importorskip("huggingface_hub")
        asked = []

        def snapshot_download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
            asked.append((name, revision, allow_patterns))
            return str(folder)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        assert checkpoints.load("someone/detr").name == "someone/detr"
        assert checkpoints.load("someone/detr@no_timm").name == "someone/detr@no_timm"
        assert [(name, revision) for name, revision, _ in asked] == [
            ("someone/detr", None),
            ("someone/detr", "no_timm"),
        ]
        assert "pytorch_model.bin" not in asked[0][2]

        (folder / "model.safetensors").rename(folder / "model.other")
        with pytest.raises(FileNotFoundError, match=r"no weights"):
            checkpoints.load("someone/detr")
        assert "pytorch_model*.bin" in asked[-1][2]

    def test_hub_out_of_reach(self, monkeypatch: pytest.MonkeyPatch) -> None:
        huggingface_hub = pytest.importorskip("huggingface_hub")

        def snapshot_download(*_args: Any, **_options: Any) -> str:
            raise OSError("no route to host\nand much more")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        with pytest.raises(ConnectionError, match=r"'someone/detr' is not a local file or folder.* no route to host$"):
            checkpoints.load("someone/detr")
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        with pytest.raises(MissingPackageError, match=r"pip install huggingface_hub"):
            checkpoints.load("someone/detr")
