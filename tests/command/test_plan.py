"""A plan whose weights have not been downloaded."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from coco_factory import Coco
from PIL import Image
from ran import RunCLI

from detr_lightning import DETRExtractor
from detr_lightning.errors import SettingError
from detr_lightning.model.detr.official import OFFICIAL


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is cached, and there is no network."""

    def no_network(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)


@pytest.mark.parametrize(
    ("weights", "encoder_output", "num_logits", "kind"),
    [
        ("detr_resnet50", 25 * 34, 92, "DETR-R50"),
        ("detr_resnet101_dc5", 50 * 67, 92, "DETR-R101-DC5"),
        ("detr_resnet50_dc5_panoptic", 50 * 67, 251, "DETR-R50-DC5"),
    ],
)
def test_a_plan_needs_no_download(
    run_cli: RunCLI, tmp_path: Path, weights: str, encoder_output: int, num_logits: int, kind: str
) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (640, 480)).save(tmp_path / "images" / "1.jpg")  # which the model sees in 800 x 1066
    folders = ("--data.image_dir", tmp_path / "images", "--output_dir", tmp_path / "out")
    plan = run_cli("predict", *folders, "--model.weights", weights, "--dry_run")
    assert plan.code == 0, plan.err
    assert f"{weights}: {kind}: 8 heads (official)" in plan.err
    assert (
        f"Its weights are not on this machine: a run downloads https://dl.fbaipublicfiles.com/detr/{OFFICIAL[weights].file}"
        in plan.err
    )
    cells = {words[1]: words for line in plan.err.splitlines() if len(words := re.split(r"\s*│\s*", line)) > 4}
    assert cells["encoder_output"][2] == f"[{encoder_output}, 256]"
    assert cells["encoder_output"][4] == f"{encoder_output * 256 * 4:,}"
    assert cells["pred_logits"][2] == f"[100, {num_logits}]"
    assert not (tmp_path / "out").exists()

    refused = run_cli("predict", *folders, "--model.weights", weights, "--dry_run", "--model.nheads", "4")
    assert "model.nheads is 4, but" in refused.err
    run = run_cli("predict", *folders, "--model.weights", weights)
    assert (run.code, "could not be downloaded" in run.err) == (1, True)


def test_a_plan_without_weights_compares_the_other_settings(run_cli: RunCLI, coco_folder: Coco, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert run_cli("predict", *coco_folder.data, "--data.limit", "1", "--output_dir", folder).code == 0
    path = folder / "metadata.json"
    content = json.loads(path.read_text())
    content["model"]["architecture"] = OFFICIAL["detr_resnet50"].architecture.to_json()
    path.write_text(json.dumps(content))

    def plan(*words: str, weights: str = "detr_resnet50") -> str:
        asked = (*coco_folder.data, "--output_dir", folder, "--model.weights", weights)
        ran = run_cli("predict", *asked, "--dry_run", *words)
        assert ran.code == ("with other settings" in ran.err), ran.err
        return ran.err

    for limit in ("1", "2"):
        said = plan("--data.limit", limit)
        assert "was extracted with them" in said
        assert ("Nothing to do" in said) == (limit == "1")
    refusal = plan("--writer.dtype", "float16")
    assert "writer.dtype was float32, now float16" in refusal
    assert "sha256" not in refusal
    assert "architecture was" in plan(weights="detr_resnet101")


def test_a_model_without_weights_does_not_run() -> None:
    model = DETRExtractor("detr_resnet50", plan_only=True)
    with pytest.raises(SettingError, match="weights of detr_resnet50 are not on this machine"):
        model(torch.zeros(1, 3, 32, 32))
    assert "plan_only" not in model.hparams
