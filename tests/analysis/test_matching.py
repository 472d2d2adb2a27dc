"""Detections matched with annotations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from store_factory import COCO_ANNOTATIONS, annotations_of, make_store

from detr_lightning.analysis.matching import match
from detr_lightning.analysis.objects import objects
from detr_lightning.store import EmbeddingStore


def rewrite(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def test_a_threshold_that_nothing_reaches_finds_no_object(store: EmbeddingStore, annotation_file: Path) -> None:
    with pytest.warns(UserWarning, match="No query of 4 images"):
        annotated, unmatched = match(store, annotation_file, threshold=1.0)
    assert len(annotated) == 12
    assert not annotated.found.any()
    assert unmatched.empty


def test_every_annotated_object_is_found(store: EmbeddingStore, annotation_file: Path, content: dict[str, Any]) -> None:
    annotated, unmatched = match(store, annotation_file)
    assert annotated.found.all()
    assert unmatched.empty
    assert annotated.annotation_id.tolist() == [a["id"] for a in content["annotations"]]
    assert annotated.file_name.tolist() == [f"{image_id:012d}.jpg" for image_id in annotated.image_id]
    assert annotated.weather.tolist() == ["rain"] * 12  # Every field of the annotation.
    assert annotated.area_class.tolist() == ["small", "medium", "large"] * 4
    assert annotated.iou.min() > 0.99
    row = annotated.iloc[4]
    assert np.array_equal(row.embedding, store[row.image_id]["query_embeddings"][row["query"]])


def test_missed_objects_and_unmatched_detections(
    store: EmbeddingStore, annotation_file: Path, content: dict[str, Any]
) -> None:
    annotations = content["annotations"]
    annotations[0]["category_id"] = 18  # It was a person: detected as another category.
    annotations[1]["bbox"][0] += 1000  # Elsewhere.
    annotations[2]["iscrowd"] = 1  # Left out, and its detection is no error.
    annotations.append({**annotations[3], "id": 99})  # A second object in the same place: one detection finds one.
    annotated, unmatched = match(store, rewrite(annotation_file, annotations=annotations))
    assert len(annotated) == 12
    assert annotated[~annotated.found].annotation_id.tolist() == [1, 2, 99]
    missed = annotated[annotated.annotation_id == 1].iloc[0]
    assert pd.isna(missed["query"])
    assert missed.embedding is None or np.isscalar(missed.embedding)
    assert annotated["query"].dtype == "Int64"
    assert unmatched["query"].tolist() == [0, 1, 2]
    assert unmatched.on_crowd.tolist() == [False, False, True]
    assert unmatched.image_id.value_counts().to_dict() == {7: 3}


def test_fields_of_annotations_do_not_pass_for_those_of_detections(
    store: EmbeddingStore, annotation_file: Path, content: dict[str, Any]
) -> None:
    table = objects(store, image_ids=[7])  # The objects of the other images are missed.
    expected = match(store, annotation_file, table).annotated
    for annotation in content["annotations"]:
        own = ("annotation_id", "file_name", "category", "area_class", "found", "query", "score", "iou", "x1")
        annotation.update(dict.fromkeys((*own, "embedding"), 5), source="drawn")
    path = rewrite(annotation_file, annotations=content["annotations"])
    annotated = match(store, path, table).annotated
    assert annotated.found.tolist() == [True] * 3 + [False] * 9
    assert annotated.source.tolist() == ["drawn"] * 12
    pd.testing.assert_frame_equal(annotated[list(expected)], expected)


def test_by_place_alone_an_object_with_another_name_is_found(
    store: EmbeddingStore, annotation_file: Path, content: dict[str, Any]
) -> None:
    content["annotations"][0]["category_id"] = 18  # It was a person: detected as another category.
    path = rewrite(annotation_file, annotations=content["annotations"])
    assert match(store, path).annotated.found.sum() == 11
    annotated, unmatched = match(store, path, same_category=False)
    assert annotated.found.all()
    assert unmatched.empty
    assert annotated.category_id[0] == 18  # The annotation's, not the model's.
    assert annotated["query"][0] == match(store, annotation_file, same_category=False).annotated["query"][0]


def test_the_likelier_detection_goes_first_and_takes_the_best_overlap(tmp_path: Path) -> None:
    content = annotations_of(1, 2)
    for annotation, x in zip(content["annotations"], (100, 110), strict=True):
        annotation.update(category_id=1, bbox=[x, 100, 100, 100], area=10_000)
    store = make_store(tmp_path / "store", content)
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    table = objects(store)
    # Both detections overlap both objects by half or more; the likelier lies nearer to the second object.
    table.loc[0, ["score", "x1", "x2"]] = [0.9, 108.0, 208.0]
    table.loc[1, ["score", "x1", "x2"]] = [0.8, 112.0, 212.0]
    annotated = match(store, path, table).annotated
    assert annotated["query"].tolist() == [1, 0]
    assert annotated.iou.tolist() == pytest.approx([88 / 112, 98 / 102])
    assert match(store, path, table, iou=0.8).annotated.found.tolist() == [False, True]
    assert match(store, path, table[table.score > 0.85]).annotated.found.tolist() == [False, True]


def test_images_without_objects_or_detections(tmp_path: Path, content: dict[str, Any], annotation_file: Path) -> None:
    store = make_store(tmp_path / "none", content)
    table = objects(store, image_ids=[7])
    annotated, unmatched = match(store, annotation_file, table)
    assert annotated.found.tolist() == [True] * 3 + [False] * 9
    annotated, unmatched = match(store, rewrite(annotation_file, annotations=[]))
    assert annotated.empty
    assert len(unmatched) == 12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": []}, r"another dataset: of the 4 images of .* it does not list 4, for example 7"),
        (
            {"images": [{"id": i, "width": 10, "height": 20} for i in (7, 17, 27, 37)]},
            "image 7 is 10x20 there and 640x480",
        ),
        (
            {"categories": [{"id": i, "name": "cat"} for i in (1, 3, 18)]},
            "has other categories .* 1 is 'cat' in the annotations and 'person' in the model",
        ),
        ({"annotations": [{"id": 1, "image_id": 7, "category_id": 1}]}, "'bbox' is missing"),
        ({"annotations": [{"id": 1, "image_id": 7, "category_id": 5, "bbox": [0, 0, 1, 1]}]}, "unknown category 5"),
        ({"annotations": None}, "not a COCO annotation file"),
    ],
)
def test_other_annotations(store: EmbeddingStore, annotation_file: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        match(store, rewrite(annotation_file, **changes))


def test_no_annotations(store: EmbeddingStore, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        match(store, tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="not a COCO annotation file"):
        match(store, tmp_path / "bad.json")
    with pytest.raises(ValueError, match="iou is 0"):
        match(store, tmp_path / "bad.json", iou=0)


@pytest.mark.skipif(not COCO_ANNOTATIONS.is_file(), reason="the sample of COCO's val2017 is not beside the repository")
def test_coco(tmp_path: Path) -> None:
    content = json.loads(COCO_ANNOTATIONS.read_text())
    store = make_store(tmp_path / "store", content, num_queries=100)
    annotated, unmatched = match(store, COCO_ANNOTATIONS)
    crowds = sum(annotation["iscrowd"] for annotation in content["annotations"])
    assert len(annotated) == len(content["annotations"]) - crowds
    assert annotated.found.all()
    assert unmatched.empty
    assert torch.tensor(np.stack(annotated.embedding)).shape == (len(annotated), 16)
