"""What is recorded of a run and its images comes back from JSON as it was, also from folders of earlier releases."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from places import ROOT
from ran import RunCLI

from detr_lightning.errors import InputError
from detr_lightning.format.entries import ImageEntry, SkippedImage
from detr_lightning.format.identity import ModelRecord, RunSettings
from detr_lightning.format.keys import FeatureSizes, ModelShape, shape_of
from detr_lightning.format.schema import Metadata, RunRecord
from detr_lightning.store import EmbeddingStore
from detr_lightning.store.verify import verify

FIXTURES = ROOT / "tests" / "fixtures"
DEMO = ROOT / "assets" / "demo"
ARCHITECTURE = {
    "block": "basic",
    "hidden_dim": 16,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "num_queries": 10,
    "num_logits": 92,
}
SETTINGS = RunSettings(
    model=ModelRecord(weights="a", sha256="0", architecture=ARCHITECTURE, category_ids=(1, None, 3)),
    keys=("query_embeddings",),
    dtype="float32",
    preprocessing={"short_side": 800},
    batching="exact",
    precision="32-true",
)
SINGLE = ImageEntry(7, "a.jpg", 64, 48, (480, 640), FeatureSizes.single((15, 20)), 1000)
LEVELS = FeatureSizes(((40, 40), (20, 20)), (20, 20))


@pytest.mark.parametrize(
    "entry",
    [
        replace(SINGLE, features=None, bytes=None),
        SINGLE,
        replace(SINGLE, checksum="0" * 16, image_sha256="1" * 64, num_queries=0),
        replace(SINGLE, features=LEVELS),
        replace(SINGLE, features=FeatureSizes(((40, 40),), (20, 20))),
    ],
)
def test_an_entry_comes_back(entry: ImageEntry) -> None:
    content = json.loads(json.dumps(entry.to_json()))
    assert ImageEntry.from_json(content) == entry


def test_one_level_is_a_feature_size_and_several_are_feature_sizes() -> None:
    assert SINGLE.to_json()["feature_size"] == (15, 20)
    assert not {"feature_sizes", "backbone_size"} & SINGLE.to_json().keys()
    content = replace(SINGLE, features=LEVELS).to_json()
    assert content["feature_sizes"] == ((40, 40), (20, 20))
    assert content["backbone_size"] == (20, 20)
    assert "feature_size" not in content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": -1}, "id is -1, not an image id"),
        ({"id": 10**12}, "not an image id"),
        ({"id": True}, "not an image id"),
        ({"file_name": None}, "file_name is missing"),
        ({"width": "64"}, "width is '64', not of type int"),
        ({"input_size": [480]}, r"input_size is \[480\], not a height and width"),
        ({"feature_size": [1, 2.5]}, "feature_size is"),
        ({"checksum": 12}, "checksum is 12, not of type str"),
        ({"bytes": [1]}, "bytes is"),
    ],
)
def test_an_entry_with_a_wrong_field_names_it(change: dict[str, Any], message: str) -> None:
    content = json.loads(json.dumps(SINGLE.to_json())) | change
    with pytest.raises(InputError, match=message):
        ImageEntry.from_json(content)


def test_metadata_comes_back() -> None:
    run = RunRecord(
        extract_type="decoder",
        settings=SETTINGS,
        categories={3: "car", 1: "person"},
        versions={"torch": "2"},
        config={"data": {"limit": None}},
    )
    metadata = Metadata(run=run, images=[SINGLE], failed=[SkippedImage(8, "b.jpg", "empty file")])
    content = json.loads(json.dumps(metadata.to_json()))
    assert list(content)[:5] == ["image_ids", "num_images", "extract_type", "embedding_keys", "images"]
    assert "min_score" not in content
    assert list(content["model"]) == ["weights", "sha256", "architecture", "family", "scoring", "category_ids"]
    assert Metadata.from_json(content) == metadata
    kept = replace(metadata, run=replace(run, settings=replace(SETTINGS, min_score=0.5)))
    assert Metadata.from_json(json.loads(json.dumps(kept.to_json()))) == kept


def test_differences_have_the_names_that_users_know() -> None:
    other = replace(
        SETTINGS,
        keys=("pred_boxes",),
        preprocessing={"short_side": 640, "long_side": 640},
        min_score=0.5,
        model=replace(SETTINGS.model, sha256="1"),
    )
    assert other.differences(SETTINGS) == [
        "weights (sha256) was 0, now 1",
        "keys was ['query_embeddings'], now ['pred_boxes']",
        "writer.min_score was None, now 0.5",
        "data.short_side was 800, now 640",
        "data.long_side was None, now 640",
    ]
    assert SETTINGS.differences(SETTINGS) == []


def test_a_field_that_older_metadata_lacks_counts_as_the_value_then_in_force() -> None:
    now = replace(SETTINGS, preprocessing={"short_side": 800, "exif": "ignore"})
    assert now.differences(SETTINGS) == []
    turned = replace(SETTINGS, preprocessing={"short_side": 800, "exif": "apply"})
    assert turned.differences(SETTINGS) == ["data.exif was ignore, now apply"]
    model = ModelRecord.from_json({"weights": "a", "sha256": "0", "architecture": ARCHITECTURE})
    assert (model.family, model.scoring) == ("detr", "softmax")
    assert model.category_ids == tuple(range(91))
    with pytest.raises(InputError, match=r"model.category_ids is 3, not a list"):
        ModelRecord.from_json({"weights": "a", "sha256": "0", "architecture": ARCHITECTURE, "category_ids": 3})


def test_shapes_of_several_levels() -> None:
    shape = ModelShape(512, 16, 2, 3, 10, 80)
    assert shape_of("backbone_features", shape, LEVELS) == (512, 20, 20)
    assert shape_of("encoder_output", shape, LEVELS) == (2000, 16)
    assert shape_of("cross_attention", shape, LEVELS) == (3, 10, 2000)


def test_the_channels_are_recorded_or_follow_from_the_blocks() -> None:
    assert ModelShape.of_architecture(ARCHITECTURE).feature_channels == 512
    assert ModelShape.of_architecture({**ARCHITECTURE, "feature_channels": 256}).feature_channels == 256
    with pytest.raises(InputError, match=r"incomplete \(no feature_channels, num_logits\)"):
        ModelShape.of_architecture({**ARCHITECTURE, "block": "wide", "num_logits": None})


def demo(out: Path) -> list[str | Path]:
    keys = "[query_embeddings,pred_logits,pred_boxes]"
    return [
        *("predict", "--config", ROOT / "configs" / "demo.yaml", "--output_dir", out),
        *("--model.weights", DEMO / "detr_demo.pth", "--model.keys", keys),
        *("--data.image_dir", DEMO / "images", "--data.annotation_file", DEMO / "instances_demo.json"),
        *("--data.limit", "3", "--writer.dtype", "float16"),
    ]


@pytest.mark.parametrize(("name", "checksums"), [("finished_0_1_0", False), ("finished_with_checksums", True)])
def test_a_finished_folder_of_an_earlier_release(name: str, checksums: bool, run_cli: RunCLI, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(FIXTURES / name, out)
    store = EmbeddingStore(out)
    assert store.image_ids == [1, 2, 3]
    assert ("checksum" in store.metadata) is checksums
    assert all((store.entry(image_id).checksum is not None) is checksums for image_id in store)
    assert store.image_path(1) == Path("assets/demo/images/000000000001.jpg")
    assert store.entry(1).features == FeatureSizes.single((6, 4))
    assert store.stack("query_embeddings")[1].shape == (3, 16, 128)
    assert verify(out) == []
    ran = run_cli(*demo(out))
    assert ran.code == 0, ran.err
    assert "is finished: 3 images. Nothing to do." in ran.err
    ran = run_cli(*demo(out), "--data.short_side", "96")
    assert ran.code == 1
    assert "data.short_side was 128, now 96" in ran.err


def test_an_unfinished_folder_of_an_earlier_release(run_cli: RunCLI, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(FIXTURES / "unfinished_0_1_0", out)
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.pt")}
    assert len(kept) == 2
    ran = run_cli(*demo(out))
    assert ran.code == 0, ran.err
    assert "2 more are finished" in ran.err
    assert verify(out) == []
    store = EmbeddingStore(out)
    assert store.image_ids == [1, 2, 3]
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    expected = EmbeddingStore(FIXTURES / "finished_0_1_0")
    for key in store.embedding_keys:
        assert store.stack(key)[1].float() == pytest.approx(expected.stack(key)[1].float(), abs=2e-2)
