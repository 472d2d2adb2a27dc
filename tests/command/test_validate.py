"""`validate` through the command, with the demo's model: right numbers, or a refusal before the first image is read."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from ran import Ran, RunCLI

from detr_lightning import COCODataModule, DETRExtractor, EmbeddingStore
from detr_lightning.errors import DETRLightningWarning, InputError, SettingError

DEMO = Path(__file__).resolve().parents[2] / "assets" / "demo"
AP = 0.861
"""Of the demo's first four images."""

Validate = Callable[..., Ran]


@pytest.fixture
def content() -> dict[str, Any]:
    """The demo's first four images, with their objects but no crowds."""
    content: dict[str, Any] = json.loads((DEMO / "instances_demo.json").read_text())
    content["images"] = content["images"][:4]
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids and not a["iscrowd"]]
    for number, annotation in enumerate(content["annotations"], start=1):
        annotation["id"] = number
    return content


@pytest.fixture
def images(tmp_path: Path, content: dict[str, Any]) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for image in content["images"]:
        shutil.copy(DEMO / "images" / image["file_name"], folder)
    return folder


def arguments(images: Path) -> list[str | Path]:
    small: list[str | Path] = ["--data.short_side", "128", "--data.long_side", "213", "--data.num_workers", "0"]
    model: list[str | Path] = ["--model.weights", DEMO / "detr_demo.pth", "--model.nheads", "8"]
    return [*model, "--model.dilation", "false", *small, "--data.image_dir", images]


@pytest.fixture
def validate(run_cli: RunCLI, images: Path, tmp_path: Path) -> Validate:
    """Validate against this content of an annotation file."""

    def run(content: Any, *more: str | Path, encoding: str = "utf-8") -> Ran:
        path = tmp_path / "annotations.json"
        path.write_text(json.dumps(content), encoding=encoding)
        return run_cli("validate", *arguments(images), "--data.annotation_file", path, *more)

    return run


def ap(ran: Ran) -> float:
    assert ran.code == 0, ran.err
    return next(float(line.split()[3]) for line in ran.out.splitlines() if " AP " in line)


def in_every_form(content: dict[str, Any]) -> dict[str, Any]:
    """Write the same annotations as labelling tools do."""
    content = copy.deepcopy(content)
    forms: list[dict[str, Any]] = [
        {"id": 0, "iscrowd": "0", "area": None},
        {"id": 0, "iscrowd": None, "category_id": str},
        {"id": "8d0f4a52-7d3c-4b7e-9c0a-0b6a3c2f7f11", "iscrowd": False, "image_id": str},
        {"id": 7, "iscrowd": ""},
        {"id": 7, "area": str, "bbox": lambda box: [str(number) for number in box]},
    ]
    for number, annotation in enumerate(content["annotations"]):
        for name, value in forms[number % len(forms)].items():
            annotation[name] = value(annotation[name]) if callable(value) else value
    del content["annotations"][-1]["iscrowd"]
    return content


def test_one_meaning_in_any_form_gives_the_same_numbers(
    validate: Validate, run_cli: RunCLI, content: dict[str, Any], images: Path, tmp_path: Path
) -> None:
    pandas = pytest.importorskip("pandas")
    from detr_lightning.analysis.matching import match

    for annotation in content["annotations"]:
        annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
    plain = validate(content)
    assert ap(plain) == AP
    forms = in_every_form(content)
    other = validate(forms, encoding="utf-16")
    assert other.out == plain.out

    predicted = run_cli("predict", *arguments(images), "--output_dir", tmp_path / "out")
    assert predicted.code == 0, predicted.err
    store = EmbeddingStore(tmp_path / "out")
    path = tmp_path / "annotations.json"
    matched = match(store, path).annotated
    assert matched.annotation_id.tolist() == [str(annotation["id"]) for annotation in forms["annotations"]]
    path.write_text(json.dumps(content), encoding="utf-8-sig")
    reference = match(store, path).annotated
    assert reference.found.sum() >= 7
    columns = ["image_id", "category_id", "category", "area_class", "found", "query", "score"]
    pandas.testing.assert_frame_equal(matched[columns], reference[columns])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a["bbox"].__setitem__(2, float("nan")), r"annotations\[1\] \(id 2\): 'bbox' is"),
        (lambda a: a.update(area=float("inf")), r"annotations\[1\] \(id 2\): 'area' is inf"),
        (lambda a: a.update(bbox=[]), r"annotations\[1\] \(id 2\): 'bbox' is \[\]"),
        (lambda a: a.update(category_id="circle"), r"annotations\[1\] \(id 2\): 'category_id' is 'circle'"),
        (lambda a: a.update(category_id=77), r"annotations\[1\] \(id 2\) has the unknown category 77"),
    ],
)
def test_broken_annotations_are_found_before_the_first_image_is_read(
    validate: Validate, content: dict[str, Any], images: Path, change: Callable[[Any], None], message: str
) -> None:
    change(content["annotations"][1])
    for file in images.iterdir():
        file.write_bytes(b"not read")
    ran = validate(content)
    assert ran.code == 1
    assert "not an image" not in ran.err
    assert re.search(message, " ".join(ran.err.split())), ran.err


def test_annotations_need_categories(validate: Validate, content: dict[str, Any]) -> None:
    del content["categories"]
    ran = validate(content)
    assert ran.code == 1
    assert "'categories' is missing or empty" in ran.err


@pytest.mark.parametrize(
    "setting", ["limit_val_batches=1", "limit_val_batches=0.5", "fast_dev_run=true", "overfit_batches=2"]
)
def test_a_part_of_the_images_is_no_validation(validate: Validate, content: dict[str, Any], setting: str) -> None:
    ran = validate(content, f"--trainer.{setting}")
    assert ran.code == 1
    assert "data.limit" in ran.err
    assert ran.out == ""


def python_side(images: Path, annotation_file: Path, weights: Path) -> tuple[DETRExtractor, COCODataModule]:
    data = COCODataModule(str(images), str(annotation_file), short_side=128, long_side=213, num_workers=0)
    return DETRExtractor(str(weights), nheads=8, dilation=False), data


def test_nor_is_it_in_python(images: Path, content: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    model, data = python_side(images, path, DEMO / "detr_demo.pth")
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, limit_val_batches=1)
    with pytest.raises(SettingError, match=r"limit_val_batches .* ends the run early"):
        trainer.validate(model, data, verbose=False)


def test_images_that_cannot_be_read_are_left_out_and_named(
    validate: Validate, content: dict[str, Any], images: Path
) -> None:
    cut, gone = (images / image["file_name"] for image in content["images"][:2])
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    gone.unlink()
    ran = validate(content, "--data.on_error", "skip")
    usable = copy.deepcopy(content)
    usable["images"] = usable["images"][2:]
    ids = {image["id"] for image in usable["images"]}
    usable["annotations"] = [a for a in usable["annotations"] if a["image_id"] in ids]
    expected = validate(usable)
    assert expected.code == 0, expected.err
    assert ran.out == expected.out
    assert "on 2 images" in ran.out
    assert "2 images could not be read" in ran.err
    assert cut.name in ran.err
    assert f"{gone.name}: no such file" in ran.err
    for file in images.iterdir():
        file.write_bytes(b"")
    ran = validate(content, "--data.on_error", "skip")
    assert ran.code == 1
    assert "None of 4 images can be read" in ran.err


def test_weights_that_hold_nan(validate: Validate, content: dict[str, Any], tmp_path: Path) -> None:
    state = torch.load(DEMO / "detr_demo.pth")
    state["model"]["class_embed.bias"][:] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    ran = validate(content, "--model.weights", tmp_path / "nan.pth")
    assert ran.code == 1
    assert "values that are not finite" in ran.err
    assert ran.out == ""


class Named(DETRExtractor):
    """A model whose checkpoint names its categories."""

    names: dict[int, str]

    @property
    def category_names(self) -> dict[int, str]:
        return self.names


@pytest.mark.filterwarnings("ignore:.*LeafSpec")
@pytest.mark.filterwarnings("ignore:.*many workers")
def test_names_that_are_another_models(images: Path, content: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    names = {category["id"]: category["name"] for category in content["categories"]}
    path.write_text(json.dumps(content))
    _, data = python_side(images, path, DEMO / "detr_demo.pth")
    model = Named(str(DEMO / "detr_demo.pth"), nheads=8, dilation=False)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    first = next(iter(names))
    model.names = {number + 1: name for number, name in names.items()}
    with pytest.raises(
        InputError, match=f"{first} is '{names[first]}' in the annotations .* which has .* at {first + 1}"
    ):
        trainer.validate(model, data, verbose=False)
    model.names = names | {first: "parrot"}
    with pytest.warns(DETRLightningWarning, match=f"{first} is '{names[first]}' in the annotations and 'parrot'"):
        trainer.validate(model, data, verbose=False)
    assert model.metrics["AP"] == pytest.approx(AP, abs=0.01)


def test_predict_warns_of_names_that_are_another_models(
    images: Path, content: dict[str, Any], run_cli: RunCLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {category["id"]: category["name"] for category in content["categories"]}
    first = next(iter(names))
    (tmp_path / "a.json").write_text(json.dumps(content))
    command = ("predict", *arguments(images), "--data.annotation_file", tmp_path / "a.json", "--dry_run")
    command += ("--output_dir", tmp_path / "out")
    shifted = {number + 1: name for number, name in names.items()}
    for theirs, warning in (
        (names, None),
        (names | {first: "parrot"}, f"{first} is '{names[first]}' in the annotations and 'parrot' in the model"),
        (shifted, f"which has '{names[first]}' at {first + 1}"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(DETRExtractor, "category_names", property(lambda _, named=theirs: named))
            ran = run_cli(*command)
        assert ran.code == 0, ran.err
        lines = [line for line in ran.err.splitlines() if "name categories differently" in line]
        assert len(lines) == (warning is not None)
        assert warning is None or (lines[0].startswith("Warning: ") and warning in lines[0])


def store_turned(images: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Store the images lying on their side, with an EXIF tag by which viewers turn them back; return their sizes."""
    for image in content["images"]:
        exif = Image.Exif()
        exif[0x0112] = 6
        with Image.open(images / image["file_name"]) as picture:
            lying = picture.transpose(Image.Transpose.ROTATE_90)
        lying.save(images / image["file_name"], quality=95, exif=exif)
    lying_sizes = copy.deepcopy(content)
    for image in lying_sizes["images"]:
        image["width"], image["height"] = image["height"], image["width"]
    return lying_sizes


def test_images_that_viewers_turn(
    validate: Validate, run_cli: RunCLI, content: dict[str, Any], images: Path, tmp_path: Path
) -> None:
    lying = store_turned(images, content)
    ran = validate(lying)
    assert ap(ran) < 0.2
    assert "Warning: 4 of 4 images have an EXIF tag" in ran.err
    assert "data.exif=apply" in ran.err
    without_sizes = copy.deepcopy(content)
    for image in without_sizes["images"]:
        del image["width"], image["height"]
    for right in (content, lying, without_sizes):
        ran = validate(right, "--data.exif", "apply")
        assert ap(ran) == pytest.approx(AP, abs=0.03)
        assert "EXIF" not in ran.err
    ran = validate(content)
    assert ran.code == 1
    assert "its EXIF tag turns it (data.exif=apply)" in ran.err

    out = ("--output_dir", tmp_path / "out", "--model.keys", "[query_embeddings]")
    annotated = ("--data.annotation_file", tmp_path / "annotations.json")
    (tmp_path / "annotations.json").write_text(json.dumps(lying))
    ran = run_cli("predict", *arguments(images), *out, *annotated)
    assert ran.code == 0, ran.err
    assert "4 of 4 images have an EXIF tag" in " ".join(ran.err.replace("│", " ").split())
    metadata = json.loads((tmp_path / "out" / "metadata.json").read_text())
    assert [image["orientation"] for image in metadata["images"]] == [6] * 4
    ran = run_cli("predict", *arguments(images), *out, *annotated, "--data.exif", "apply")
    assert "data.exif was ignore, now apply" in ran.err
    ran = run_cli("predict", *arguments(images), *out, "--data.exif", "apply", "--writer.if_exists", "overwrite")
    assert ran.code == 0, ran.err
    metadata = json.loads((tmp_path / "out" / "metadata.json").read_text())
    sizes = [(image["width"], image["height"]) for image in metadata["images"]]
    assert sizes == [(image["width"], image["height"]) for image in content["images"]]
