"""The command line: what it accepts, what it says, and how it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from coco_factory import Coco, make_coco
from ran import RunCLI

Capture = pytest.CaptureFixture[str]


def test_dry_run_announces_and_writes_nothing(run_cli: RunCLI, coco_folder: Coco, tmp_path: Path) -> None:
    ran = run_cli("predict", *coco_folder.data, "--output_dir", tmp_path / "out", "--dry_run")
    assert ran.code == 0
    assert "8 images" in ran.err
    assert "free" in ran.err
    assert "decoder_output" in ran.err
    assert not (tmp_path / "out").exists()


def test_a_run_is_calm_and_a_second_one_has_nothing_to_do(
    run_cli: RunCLI, coco_folder: Coco, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = run_cli("predict", *coco_folder.data)
    assert first.code == 0
    assert first.out == ""
    for word in ("Tip", "TPU", "GPU available", "Warning", "Lightning", "deprecated"):
        assert word not in first.err
    assert "8 images" in first.err
    before = {path.name: path.stat().st_mtime_ns for path in Path("embeddings_output").iterdir()}
    second = run_cli("predict", *coco_folder.data)
    assert second.code == 0
    assert "Nothing to do" in second.err
    assert {path.name: path.stat().st_mtime_ns for path in Path("embeddings_output").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["embeddings_output"]


def test_names_in_brackets_are_said_as_they_are(
    run_cli: RunCLI, coco_folder: Coco, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = run_cli("predict", *coco_folder.data, "--data.limit", "1", "--output_dir", "[bold]out")
    assert ran.code == 0, ran.err
    assert f"1 image to {tmp_path / '[bold]out'}" in ran.err


def test_settings_come_from_yaml_and_flags_override_them(run_cli: RunCLI, coco_folder: Coco, tmp_path: Path) -> None:
    config = tmp_path / "job.yaml"
    config.write_text(f"extract_type: encoder\noutput_dir: {tmp_path / 'a'}\ndata: {{limit: 1}}\n")
    ran = run_cli("predict", "--config", config, *coco_folder.data, "--extract_type", "backbone")
    assert ran.code == 0, ran.err
    metadata = json.loads((tmp_path / "a" / "metadata.json").read_text())
    assert (metadata["extract_type"], metadata["num_images"]) == ("backbone", 1)
    assert metadata["config"]["data"]["limit"] == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--extract_type", "decodr"], ["extract_type", "'decodr'", "Did you mean 'decoder'?"]),
        (["--model.keys", "[query_embedding]"], ["model.keys", "Did you mean 'query_embeddings'?"]),
        (["--model.keys", "[]"], ["model.keys is empty"]),
        (["--writer.dtype", "float8"], ["writer.dtype", "float32, float16"]),
        (["--writer.if_exists", "resum"], ["writer.if_exists", "Did you mean 'resume'?"]),
        (["--writer.threads", "0"], ["writer.threads is 0"]),
        (["--model.weights", "detr_resnet5"], ["model.weights", "detr_resnet50"]),
        (["--model.weights", "no/such/file.pth"], ["no/such/file.pth"]),
        (["--model.weigths", "random"], ["model.weigths", "Did you mean 'model.weights'?"]),
        (["--model.extract_type", "all"], ["extract_type (--extract_type)"]),
        (["--writer.output_dir", "x"], ["output_dir (--output_dir)"]),
        (["--extract", "all"], ["extract"]),
        (["--data.batch_size", "0"], ["data.batch_size is 0"]),
        (["--data.batch_size", "many"], ["data.batch_size is 'many', but must be one of: "]),
        (["--model.keys", "pred_boxes"], ["model.keys is 'pred_boxes'", "a list such as '[a, b]'"]),
        (["--model.weights", ""], ["model.weights is ''"]),
        (["--trainer.precision", "8"], ["trainer.precision is '8'", "'bf16-mixed'"]),
        (["--trainer.devices", "x"], ["devices"]),
        (["--trainer.limit_predict_batches", "0.5"], ["trainer.limit_predict_batches", "data.limit"]),
        (["--trainer.fast_dev_run", "true"], ["trainer.fast_dev_run", "data.limit"]),
        (["--data.image_dir", ""], ["data.image_dir is empty"]),
        (["--data.limit", "0"], ["data.limit"]),
        (["--data.image_ids", "[2]"], ["2", "1"]),
        (["--data.batching", "exactly"], ["data.batching", "Did you mean 'exact'?"]),
        (["--data.image_backend", "cv2"], ["data.image_backend", "pil, torchvision"]),
        (["--data.on_error", "ignore"], ["data.on_error", "raise, skip"]),
        (["--data.image_dir", "no/such/folder"], ["no/such/folder", "data.image_dir"]),
        (["--data.annotation_file", "no/such/file.json"], ["no/such/file.json", "data.annotation_file"]),
        (["--trainer.precision", "16-mixed", "--trainer.accelerator", "cpu"], ["16-mixed", "Use 32-true"]),
        (["--trainer.precisoin", "32"], ["trainer.precisoin", "trainer.precision"]),
    ],
)
def test_a_wrong_setting_is_refused_in_a_line_or_two(
    arguments: list[str], said: list[str], run_cli: RunCLI, coco_folder: Coco, tmp_path: Path
) -> None:
    ran = run_cli("predict", *coco_folder.data, "--output_dir", tmp_path / "out", *arguments)
    assert ran.code == 1
    assert ran.err.count("Error: ") == 1
    for words in said:
        assert words in ran.err
    assert "Traceback" not in ran.err
    assert len(ran.err) < 700, ran.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("model: {extract_type: all}", ["extract_type (--extract_type)"]),
        ("writer: {output_dir: x}", ["output_dir (--output_dir)"]),
        ("model: {weigths: random}", ["weigths", "Did you mean 'model.weights'?"]),
        ("extract_typ: all", ["extract_typ", "Did you mean 'extract_type'?"]),
        ("# nothing but a remark", ["job.yaml"]),
        ("model: [", ["job.yaml"]),
    ],
)
def test_a_wrong_key_in_a_yaml_is_refused(
    settings: str, said: list[str], run_cli: RunCLI, coco_folder: Coco, tmp_path: Path
) -> None:
    config = tmp_path / "job.yaml"
    config.write_text(settings + "\n")
    ran = run_cli("predict", "--config", config, *coco_folder.data, "--output_dir", tmp_path / "out")
    assert ran.code == 1
    for words in said:
        assert words in ran.err
    assert "Traceback" not in ran.err
    assert len(ran.err) < 700, ran.err


def test_settings_that_are_missing_or_in_the_wrong_place(run_cli: RunCLI, tmp_path: Path) -> None:
    config = tmp_path / "job.yaml"
    config.write_text("model: {weights: random}\n")
    for words in ((), ("--config", config), ("--data.limit", "3")):
        said = run_cli("predict", *words).err
        assert "data.image_dir is required" in said
        assert "--config demo" in said
    assert "The verb comes first, then settings such as --config" in run_cli("--config", config, "predict").err
    assert "output_dir is empty" in run_cli("predict", "--data.image_dir", tmp_path, "--output_dir", "").err


def test_images_are_looked_for_before_weights(run_cli: RunCLI, coco_folder: Coco, tmp_path: Path) -> None:
    argv = ("predict", "--data.image_dir", tmp_path / "none", "--model.weights", tmp_path / "none.pth")
    assert "data.image_dir does not exist" in run_cli(*argv).err
    elsewhere = ("--data.image_dir", tmp_path, *coco_folder.data[2:])
    ran = run_cli("predict", *elsewhere, "--data.on_error", "skip", "--output_dir", tmp_path / "out")
    assert ran.code == 1
    assert "none of the 8 images of" in ran.err


def test_a_tilde_is_the_home_folder(
    run_cli: RunCLI, coco_folder: Coco, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "coco").symlink_to(coco_folder.images.parent)
    images, annotations = "~/coco/" + coco_folder.images.name, "~/coco/" + coco_folder.annotations.name
    given = ("--data.image_dir", images, "--data.annotation_file", annotations, *coco_folder.data[4:])
    ran = run_cli("predict", *given, "--data.limit", "1", "--output_dir", "~/out")
    assert ran.code == 0, ran.err
    assert (tmp_path / "out" / "metadata.json").is_file()


def test_ctrl_c_while_the_command_is_imported() -> None:
    imported = "import sys\nclass Meta:\n    def find_spec(self, name, *_):\n"
    imported += "        if name == 'lightning': raise KeyboardInterrupt\nsys.meta_path.insert(0, Meta())\n"
    script = imported + "from detr_lightning.__main__ import main\nraise SystemExit(main())"
    command = [sys.executable, "-c", script, "predict", "--config", "demo"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (130, "Error: Interrupted before anything was done.\n")


def test_an_output_folder_that_is_a_file(run_cli: RunCLI, coco_folder: Coco, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    ran = run_cli("predict", *coco_folder.data, "--output_dir", tmp_path / "out")
    assert ran.code == 1
    assert "is a file" in ran.err
    assert (tmp_path / "out").read_text() == "mine"


def test_a_disk_that_is_too_small(
    run_cli: RunCLI, coco_folder: Coco, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    ran = run_cli("predict", *coco_folder.data, "--output_dir", tmp_path / "out")
    assert ran.code == 1
    assert "1.0 kB free" in ran.err
    assert "writer.dtype=float16" in ran.err
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_does_not_fit(run_cli: RunCLI, coco_folder: Coco, tmp_path: Path, tiny_weights: Path) -> None:
    content = torch.load(tiny_weights)
    content["model"]["input_proj.weight"] = torch.zeros(32, 7, 1, 1)
    torch.save(content, tmp_path / "other.pth")
    ran = run_cli("predict", *coco_folder.data, "--model.weights", tmp_path / "other.pth")
    assert ran.code == 1
    assert "input_proj.weight" in ran.err
    assert "7" in ran.err


def test_values_that_float16_cannot_hold(
    run_cli: RunCLI, coco_folder: Coco, tmp_path: Path, tiny_weights: Path
) -> None:
    content = torch.load(tiny_weights)
    content["model"]["transformer.decoder.norm.bias"].fill_(1e5)
    torch.save(content, tmp_path / "large.pth")
    argv = ("--model.weights", tmp_path / "large.pth", "--writer.dtype", "float16", "--output_dir", tmp_path / "out")
    ran = run_cli("predict", *coco_folder.data, *argv)
    assert ran.code == 1
    assert "writer.dtype=float32" in ran.err
    assert not (tmp_path / "out" / "metadata.json").exists()


def test_validate_prints_the_twelve_numbers(run_cli: RunCLI, coco_folder: Coco) -> None:
    ran = run_cli("validate", *coco_folder.data)
    assert ran.code == 0, ran.err
    for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"):
        assert f" {name} " in ran.out


def test_validate_needs_no_area_and_no_crowds(run_cli: RunCLI, coco_folder: Coco, tmp_path: Path) -> None:
    content = json.loads(coco_folder.annotations.read_text())
    for annotation in content["annotations"]:
        del annotation["area"], annotation["iscrowd"]  # its box's, and 0
    (tmp_path / "less.json").write_text(json.dumps(content))
    less = run_cli("validate", *coco_folder.data, "--data.annotation_file", tmp_path / "less.json")
    assert less.code == 0, less.err
    assert less.out == run_cli("validate", *coco_folder.data).out


def test_validate_refuses_what_it_cannot_compare(run_cli: RunCLI, tmp_path: Path) -> None:
    coco = make_coco(tmp_path, 3)
    small = coco.data[4:]
    ran = run_cli("validate", "--data.image_dir", coco.images, *small)
    assert ran.code == 1
    assert "data.annotation_file" in ran.err

    content = json.loads(coco.annotations.read_text())
    (tmp_path / "none.json").write_text(json.dumps({**content, "annotations": []}))
    ran = run_cli("validate", "--data.image_dir", coco.images, "--data.annotation_file", tmp_path / "none.json", *small)
    assert ran.code == 1
    assert "no annotation" in ran.err

    given = {**content, "annotations": [{**content["annotations"][0], "bbox": [1, 2]}]}
    (tmp_path / "box.json").write_text(json.dumps(given))
    ran = run_cli("validate", "--data.image_dir", coco.images, "--data.annotation_file", tmp_path / "box.json", *small)
    assert ran.code == 1
    assert "annotations[0] (id 1): 'bbox' is [1, 2]" in ran.err

    assert "for predict" in run_cli("validate", *coco.data, "--dry_run").err

    content["categories"].append({"id": 200, "name": "unicorn"})
    (tmp_path / "more.json").write_text(json.dumps(content))
    ran = run_cli("validate", "--data.image_dir", coco.images, "--data.annotation_file", tmp_path / "more.json", *small)
    assert ran.code == 1
    assert "200 (unicorn)" in ran.err
    assert "Traceback" not in ran.err
