"""Runs of the command with other detectors than DETR, from images to what is read back."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from rich.filesize import decimal

from detr_lightning import EmbeddingStore
from detr_lightning.analysis.features import object_features
from detr_lightning.analysis.matching import match
from detr_lightning.analysis.objects import objects
from detr_lightning.model.labels import coco_names

REFERENCE = Path(__file__).parent / "model"


@pytest.fixture(scope="module")
def reference() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REFERENCE)
        import family_reference

        return family_reference


@pytest.fixture(scope="module")
def folders(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    names = {0: "person", 1: "bicycle", 2: "car"}
    labels = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    sizes = {
        "rt_detr_v2": {"height": 96, "width": 128},
        "conditional_detr": reference.SIDES,
        "deformable_detr": reference.SIDES,
    }
    return {
        model_type: reference.save(reference.build(model_type, **labels), tmp_path_factory.mktemp(model_type), size)
        for model_type, size in sizes.items()
    }


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for number, (height, width) in enumerate([(60, 90), (100, 80), (60, 90), (64, 200)], start=1):
        coarse = Image.fromarray(random.integers(0, 256, (6, 9, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    annotations = {
        "images": [
            {"id": n, "file_name": f"{n}.png", "height": h, "width": w}
            for n, (h, w) in enumerate([(60, 90), (100, 80), (60, 90), (64, 200)], start=1)
        ],
        "annotations": [
            {"id": n, "image_id": n, "category_id": n % 3, "bbox": [5, 5, 30, 30], "area": 900, "iscrowd": 0}
            for n in (1, 2, 3, 4)
        ],
        "categories": [{"id": 0, "name": "person"}, {"id": 1, "name": "bicycle"}, {"id": 2, "name": "car"}],
    }
    (folder / "instances.json").write_text(json.dumps(annotations))
    return folder


def test_a_model_of_several_levels(
    run_cli: Any, reference: Any, folders: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    from detr_lightning.model import checkpoints

    folder, output = folders["rt_detr_v2"], tmp_path / "out"
    asked = ["predict", "--data.image_dir", images, "--model.weights", folder, "--output_dir", output]
    dry = run_cli(*asked, "--extract_type", "all", "--dry_run")
    assert dry.code == 0, dry.err
    assert run_cli(*asked, "--extract_type", "all", "--data.batch_size", "3").code == 0

    store = EmbeddingStore(output)
    assert store.image_ids == [1, 2, 3, 4]
    model = store.metadata["model"]
    assert (model["family"], model["scoring"], model["category_ids"]) == ("rt_detr_v2", "sigmoid", None)
    assert store.categories == {0: "person", 1: "bicycle", 2: "car"}
    assert store.metadata["preprocessing"]["processor"] == "RTDetrImageProcessor"
    assert store.metadata["preprocessing"]["backend"] == "torchvision"
    entry = store.metadata["images"][0]
    assert (entry["feature_sizes"], entry["backbone_size"]) == ([[12, 16], [6, 8], [3, 4]], [3, 4])
    assert "feature_size" not in entry

    checkpoint = checkpoints.load(str(folder))
    assert checkpoint.processor is not None
    network: Any = checkpoint.model
    table = objects(store, 0.0).groupby("image_id").head(1).reset_index(drop=True)
    table[["x1", "y1"]] = 0.0
    table[["x2", "y2"]] = [store.entry(image_id).size[::-1] for image_id in table.image_id]
    features = object_features(store, table)  # of boxes as large as the image: a map's mean
    assert {f"encoder level {level}" for level in range(3)} | {"backbone"} < features.keys()
    for row, image_id in enumerate(table.image_id):
        for level in range(3):
            mean = store.feature_map(image_id, level=level).mean((1, 2)).numpy()
            assert features[f"encoder level {level}"][row] == pytest.approx(mean, abs=1e-5)

    for image_id in store:
        with Image.open(images / f"{image_id}.png") as image:
            pixels = checkpoint.processor(image.convert("RGB"), (96, 128))
        expected = reference.reference_outputs(network.model, pixels[None])
        for key, tensor in store[image_id].items():
            torch.testing.assert_close(tensor, expected[key][0], rtol=1e-4, atol=1e-5)
        assert torch.equal(store[image_id]["decoder_output"][-1], store[image_id]["query_embeddings"])
        for level, grid in enumerate(reference.level_maps(network.model, pixels[None])):
            torch.testing.assert_close(store.feature_map(image_id, level=level), grid[0], rtol=1e-4, atol=1e-5)

    assert [tuple(store.feature_map(2, level=level).shape) for level in range(3)] == [
        (32, 12, 16),
        (32, 6, 8),
        (32, 3, 4),
    ]
    with pytest.raises(ValueError, match="level is 3; image 2 has levels 0 to 2"):
        store.feature_map(2, level=3)

    before = store[3]
    (output / "embedding_000000000003.pt").unlink()
    resumed = run_cli(*asked, "--extract_type", "all", "--data.batch_size", "1")
    assert resumed.code == 0, resumed.err
    assert all(torch.equal(tensor, before[key]) for key, tensor in EmbeddingStore(output)[3].items())
    assert run_cli("verify", output).code == 0
    coco = tmp_path / "detections.json"
    assert run_cli("export", output, "--output", coco, "--format", "coco").code == 0
    rows = [row for row in json.loads(coco.read_text()) if row["image_id"] == 1]
    assert len(rows) == 9
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)


def test_contiguous_labels_become_ids_of_coco_everywhere(
    run_cli: Any, reference: Any, images: Path, tmp_path: Path
) -> None:
    names = list(coco_names().items())
    labels = {"id2label": {n: name for n, (_, name) in enumerate(names)}, "label2id": None}
    weights = reference.save(reference.build("rf_detr", **labels), tmp_path / "weights")
    output, table = tmp_path / "out", tmp_path / "objects.parquet"
    asked = ("--data.image_dir", images, "--model.weights", weights)
    assert run_cli("predict", *asked, "--output_dir", output, "--extract_type", "decoder").code == 0
    store = EmbeddingStore(output)
    assert store.metadata["model"]["category_ids"] == [number for number, _ in names]
    assert store.categories[79] == "toothbrush"  # by the logit's index

    assert run_cli("objects", output, "--threshold", "0", "--output", table).code == 0
    found = pd.read_parquet(table)
    for row in found.itertuples():
        best = int(store.load(row.image_id, "pred_logits")[row.query].argmax())
        assert (row.category_id, row.category) == names[best]
    assert found.category_id.max() > 79

    # The best object of each image, as somebody might have annotated it.
    best_of_each = found.sort_values("score").groupby("image_id").tail(1).sort_values("image_id")
    annotations = json.loads((images / "instances.json").read_text()) | {
        "categories": [{"id": number, "name": name} for number, name in names],
        "annotations": [
            {"id": n, "image_id": row.image_id, "category_id": row.category_id, "bbox": list(row.bbox), "iscrowd": 0}
            for n, row in enumerate(best_of_each.itertuples(), start=1)
        ],
    }
    truth, metrics = tmp_path / "truth.json", [tmp_path / "validated.json", tmp_path / "evaluated.json"]
    truth.write_text(json.dumps(annotations, default=float))
    annotated, _ = match(store, truth, threshold=0.0)
    assert list(annotated.category_id) == [row["category_id"] for row in annotations["annotations"]]
    assert annotated["query"].notna().all()
    validated = run_cli("validate", *asked, "--data.annotation_file", truth, "--output", metrics[0])
    assert validated.code == 0, validated.err
    evaluated = run_cli("evaluate", output, "--annotations", truth, "--output", metrics[1])
    assert evaluated.code == 0, evaluated.err
    from_model, from_store = (json.loads(path.read_text()) for path in metrics)
    assert from_model["AR100"] == from_store["AR100"] == 1
    assert from_model["AP"] == pytest.approx(from_store["AP"], abs=1e-6)
    coco = tmp_path / "detections.json"
    assert run_cli("export", output, "--output", coco, "--format", "coco").code == 0
    assert {row["category_id"] for row in json.loads(coco.read_text())} <= {number for number, _ in names}


def test_a_model_of_one_level_and_varying_sizes(
    run_cli: Any, folders: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    asked = ["--data.image_dir", images, "--model.weights", folders["conditional_detr"]]
    keys = "[query_embeddings,cross_attention,encoder_output,pred_logits,pred_boxes]"
    ran = run_cli("predict", *asked, "--output_dir", output, "--model.keys", keys, "--writer.dtype", "float16")
    assert ran.code == 0, ran.err
    store = EmbeddingStore(output)
    entries = {entry["id"]: entry for entry in store.metadata["images"]}
    assert (entries[1]["input_size"], entries[1]["feature_size"]) == ([96, 144], [3, 5])
    assert entries[4]["input_size"] == [51, 160]
    assert "feature_sizes" not in entries[1]
    assert "backbone_size" not in entries[1]
    assert store[1]["cross_attention"].shape == (3, 9, 15)
    assert store[1]["query_embeddings"].dtype == torch.float16
    assert store.feature_map(4, "cross_attention").shape == (3, 9, 2, 5)
    assert run_cli("verify", output).code == 0

    validated = run_cli("validate", *asked, "--data.annotation_file", images / "instances.json")
    assert validated.code == 0, validated.err
    assert "4 images" in validated.out


def test_what_other_detectors_refuse(run_cli: Any, folders: dict[str, Path], images: Path, tmp_path: Path) -> None:
    asked = ["predict", "--data.image_dir", images, "--output_dir", tmp_path / "out"]
    fixed = [*asked, "--model.weights", folders["rt_detr_v2"]]
    for settings, message in {
        ("--data.short_side", "400"): "data.short_side",
        ("--data.image_backend", "torchvision"): "data.image_backend",
        ("--data.batching", "padded", "--data.batch_size", "2"): "data.batching",
        ("--model.keys", "[cross_attention]"): "has no cross_attention",
    }.items():
        ran = run_cli(*fixed, *settings)
        assert ran.code == 1
        assert message in ran.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model_type", ["rt_detr_v2", "deformable_detr"])
def test_the_plan_has_the_bytes_of_the_files(
    run_cli: Any, folders: dict[str, Path], images: Path, tmp_path: Path, model_type: str
) -> None:
    output = tmp_path / "out"
    asked = ["predict", "--data.image_dir", images, "--model.weights", folders[model_type], "--output_dir", output]
    asked += ["--model.keys", "[backbone_features,encoder_output,decoder_output,pred_logits,pred_boxes]"]
    asked += ["--writer.dtype", "float16"]
    plans = {n: run_cli(*asked, "--data.image_ids", f"[{n}]", "--dry_run").err for n in (1, 2, 4)}
    assert not output.exists()
    assert run_cli(*asked).code == 0
    store = EmbeddingStore(output)
    for image_id, plan in plans.items():
        planned = dict(re.findall(r"│ (\w+) +│ \[.*\] +│ \w+ +│ +([\d,]+) │", plan))
        assert {key: int(size.replace(",", "")) for key, size in planned.items()} == {
            key: tensor.nbytes for key, tensor in store[image_id].items()
        }
        total = sum(tensor.nbytes for tensor in store[image_id].values())
        assert f"about {decimal(total + 2048)}" in plan
        assert abs(store.path(image_id).stat().st_size - total - 2048) < 600


def test_annotations_of_other_categories(run_cli: Any, folders: dict[str, Path], images: Path, tmp_path: Path) -> None:
    asked = ["--data.image_dir", images, "--model.weights", folders["conditional_detr"]]
    content = json.loads((images / "instances.json").read_text())
    content["categories"][2] = {"id": 7, "name": "kite"}
    for annotation in content["annotations"]:
        annotation["category_id"] = {2: 7}.get(annotation["category_id"], annotation["category_id"])
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content))
    refused = run_cli("validate", *asked, "--data.annotation_file", other)
    assert refused.code == 1
    assert "The annotations have categories that the model has no logit for: 7 (kite)" in refused.err
    assert "the category ids 0 to 2" in refused.err
    output = tmp_path / "out"
    extracted = run_cli("predict", *asked, "--data.annotation_file", other, "--output_dir", output)
    assert extracted.code == 0, extracted.err
    assert "name categories differently: 7 is 'kite' in the annotations and no category in the model" in extracted.err

    content["categories"] = [
        {"id": n, "name": f"{category['name']}s"} for n, category in enumerate(content["categories"])
    ]
    for annotation in content["annotations"]:
        annotation["category_id"] %= 3
    other.write_text(json.dumps(content))
    for command in (("validate", *asked, "--data.annotation_file"), ("evaluate", output, "--annotations")):
        refused = run_cli(*command, other)
        assert refused.code == 1
        assert "0 is 'persons' in the annotations and 'person' in the model" in refused.err


def test_values_that_overflow_are_refused_and_not_kept(
    run_cli: Any, folders: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    weights = Path(shutil.copytree(folders["conditional_detr"], tmp_path / "weights"))
    tensors = safetensors.load_file(weights / "model.safetensors")
    tensors["class_labels_classifier.weight"].sign_().mul_(3e38)  # Finite, and logits are not.
    safetensors.save_file(tensors, weights / "model.safetensors", metadata={"format": "pt"})
    output = tmp_path / "out"
    asked = ["--data.image_dir", images, "--model.weights", weights, "--data.batch_size", "1"]
    for precision in ("32-true", "bf16-mixed"):
        ran = run_cli(
            *("predict", *asked, "--output_dir", output, "--allow_slow_precision", "--trainer.precision", precision)
        )
        assert ran.code == 1
        assert re.search(r"image \d: pred_logits has values that are not finite", ran.err)
        assert not list(output.glob("*.pt"))
        assert not (output / "metadata.json").exists()
        shutil.rmtree(output, ignore_errors=True)
    validated = run_cli("validate", *asked, "--data.annotation_file", images / "instances.json")
    assert validated.code == 1
    assert "pred_logits has values that are not finite" in validated.err


def test_annotations_give_no_names_to_unknown_categories(
    run_cli: Any, reference: Any, images: Path, tmp_path: Path
) -> None:
    """Without names nobody knows which category a logit of another detector is."""
    folder = reference.save(reference.build("rt_detr_v2"), tmp_path / "unnamed", {"height": 96, "width": 128})
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {str(number): f"LABEL_{number}" for number in range(len(config["id2label"]))}
    (folder / "config.json").write_text(json.dumps(config))
    command = ("predict", "--data.image_dir", images, "--data.annotation_file", images / "instances.json")
    ran = run_cli(*command, "--model.weights", folder, "--output_dir", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert EmbeddingStore(tmp_path / "out").categories == {}


@pytest.mark.parametrize(
    "changed", [{"resample": 3}, {"do_center_crop": True, "crop_size": {"height": 64, "width": 64}}], ids=str
)
def test_other_settings_of_the_processor_are_refused(
    run_cli: Any, folders: dict[str, Path], images: Path, tmp_path: Path, changed: dict[str, Any]
) -> None:
    folder = Path(shutil.copytree(folders["rt_detr_v2"], tmp_path / "model"))
    command = ("predict", "--data.image_dir", images, "--model.weights", folder, "--output_dir", tmp_path / "out")
    assert run_cli(*command, "--data.limit", "1").code == 0
    assert "others" not in EmbeddingStore(tmp_path / "out").metadata["preprocessing"]
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    ran = run_cli(*command)
    assert ran.code == 1
    assert "data.others was None, now {" in ran.err
