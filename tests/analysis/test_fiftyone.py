"""FiftyOne is a heavy extra with a database of its own: these tests run where it is installed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from store_factory import annotations_of, make_store

from detr_lightning.analysis.objects import objects
from detr_lightning.store import EmbeddingStore

fiftyone = pytest.importorskip("fiftyone", reason="FiftyOne is not installed")
pytestmark = pytest.mark.filterwarnings("default")  # FiftyOne's dependencies deprecate each other.

from detr_lightning.analysis.fiftyone import to_dataset, to_samples  # noqa: E402


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    content = annotations_of()
    for image in content["images"]:
        Image.new("RGB", (image["width"], image["height"]), "gray").save(tmp_path / image["file_name"])
    content["annotations"][0]["iscrowd"] = 1
    (tmp_path / "instances.json").write_text(json.dumps(content))
    return make_store(tmp_path / "store", annotations_of(), image_dir=tmp_path)


def test_samples_have_detections_with_vectors_and_ground_truth(store: EmbeddingStore, tmp_path: Path) -> None:
    samples = list(to_samples(store, annotation_file=tmp_path / "instances.json"))
    table = objects(store)
    assert [sample.image_id for sample in samples] == store.image_ids
    for sample in samples:
        rows = table[table.image_id == sample.image_id]
        assert Path(sample.filepath) == tmp_path / rows.file_name.iloc[0]
        found = sample.detections.detections
        assert [detection.label for detection in found] == rows.category.tolist()
        assert [detection.confidence for detection in found] == pytest.approx(rows.score.tolist())
        assert np.array_equal(np.stack([detection.embedding for detection in found]), np.stack(rows.embedding))
        # The store's predictions are the annotations.
        truth = sample.ground_truth.detections
        for one, other in zip(found, truth, strict=True):
            assert one.bounding_box == pytest.approx(other.bounding_box, abs=1e-4)
            assert one.label == other.label
    assert samples[0].ground_truth.detections[0].iscrowd
    width, height = 640, 480
    x, y, w, h = table.bbox[0]
    relative = samples[0].detections.detections[0].bounding_box
    assert relative == pytest.approx([x / width, y / height, w / width, h / height])


def test_the_dataset_is_searched_by_its_vectors(store: EmbeddingStore) -> None:
    try:
        dataset = to_dataset(store)
    except Exception as error:
        if "MongoDB" not in str(error):
            raise
        pytest.skip(f"FiftyOne's database does not start here: {error}")
    import fiftyone.brain as fob

    try:
        index = fob.compute_similarity(dataset, patches_field="detections", embeddings="embedding", brain_key="similar")
        assert index.total_index_size == len(objects(store))
        first = dataset.first().detections.detections[0].id
        near = dataset.to_patches("detections").sort_by_similarity(first, k=3, brain_key="similar")
        assert near.first().id == first
    finally:
        dataset.delete()
