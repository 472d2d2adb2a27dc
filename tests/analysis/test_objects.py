"""The table of objects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from store_factory import make_store

from detr_lightning.analysis.matching import match
from detr_lightning.analysis.objects import objects, write
from detr_lightning.detections import coco_results, detect
from detr_lightning.store import EmbeddingStore


def rewrite(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def test_a_row_for_each_object(store: EmbeddingStore, content: dict[str, Any]) -> None:
    table = objects(store)
    columns = ["image_id", "file_name", "query", "category_id", "category", "score", "x1", "y1", "x2", "y2", "bbox"]
    assert list(table) == [*columns, "area_class", "embedding"]
    assert len(table) == len(content["annotations"])
    for row, annotation in zip(table.itertuples(), content["annotations"], strict=True):
        assert (row.image_id, row.category_id) == (annotation["image_id"], annotation["category_id"])
        assert row.category == {1: "person", 3: "car", 18: "dog"}[row.category_id]
        assert row.file_name == f"{row.image_id:012d}.jpg"
        assert row.bbox == pytest.approx(annotation["bbox"], abs=1e-3)
        assert [row.x1, row.y1] == row.bbox[:2]
        assert row.x2 - row.x1 == pytest.approx(row.bbox[2])
        assert row.score >= 0.7
        assert np.array_equal(row.embedding, store[row.image_id]["query_embeddings"][row.query])
    assert table.area_class.tolist() == ["small", "medium", "large"] * 4
    assert np.stack(table.embedding).shape == (len(table), 16)


def test_the_rows_are_those_of_the_coco_results(store: EmbeddingStore) -> None:
    table = objects(store, 0, key=None)
    assert len(table) == 4 * 10
    assert "embedding" not in table
    entry, tensors = store.entry(17), store[17]
    found = detect(tensors["pred_logits"], tensors["pred_boxes"], entry.size)
    rows = table[table.image_id == 17][["image_id", "category_id", "bbox", "score"]].to_dict("records")
    assert len(rows) == 10
    for row, other in zip(rows, coco_results(17, found), strict=True):
        assert row["bbox"] == pytest.approx(other["bbox"])
        assert {**row, "bbox": 0} == {**other, "bbox": 0}


def test_embeddings_of_another_layer(store: EmbeddingStore) -> None:
    table = objects(store, image_ids=[27], key="decoder_output", layer=0)
    row = table.iloc[1]
    assert np.array_equal(row["embedding"], store[27]["decoder_output"][0, row["query"]])


def test_float16_embeddings_become_float32(tmp_path: Path) -> None:
    table = objects(make_store(tmp_path / "half", dtype="float16"))
    assert table.embedding[0].dtype == np.float32


def test_unnamed_categories_keep_their_number(tmp_path: Path, content: dict[str, Any]) -> None:
    table = objects(make_store(tmp_path / "unnamed", content | {"categories": []}))
    assert set(table.category) == {"1", "3", "18"}


def test_parquet(store: EmbeddingStore, annotation_file: Path, tmp_path: Path) -> None:
    table = objects(store)
    read = pd.read_parquet(write(table, tmp_path / "objects.parquet"))
    assert list(read) == list(table)
    assert np.array_equal(np.stack(read.embedding), np.stack(table.embedding))
    crowd = json.loads(annotation_file.read_text())["annotations"]
    crowd[0]["segmentation"] = {"counts": "abc", "size": [1, 2]}
    annotated = match(store, rewrite(annotation_file, annotations=crowd)).annotated
    read = pd.read_parquet(write(annotated, tmp_path / "matched.parquet"))
    assert json.loads(read.segmentation[0]) == crowd[0]["segmentation"]
    assert sorted(path.name for path in tmp_path.glob(".*")) == []


@pytest.mark.parametrize("threshold", [-0.1, 1.5])
def test_a_threshold_is_a_probability(store: EmbeddingStore, threshold: float) -> None:
    with pytest.raises(ValueError, match="from 0 to 1"):
        objects(store, threshold)


def test_a_threshold_that_nothing_reaches_gives_an_empty_table(store: EmbeddingStore) -> None:
    full = objects(store)
    with pytest.warns(UserWarning, match=r"No query of 4 images scores 1\.0 or more; the best is 0\.9.*in image \d+"):
        table = objects(store, 1.0)
    assert table.empty
    assert list(table) == list(full)
    with pytest.warns(UserWarning, match="No image of"):
        assert objects(store, image_ids=[]).empty


def test_missing_keys(tmp_path: Path) -> None:
    store = make_store(tmp_path / "few", keys=("query_embeddings", "pred_logits"))
    with pytest.raises(ValueError, match="has no 'pred_boxes'"):
        objects(store)
    store = make_store(tmp_path / "encoder", keys=("encoder_output", "pred_logits", "pred_boxes"))
    with pytest.raises(ValueError, match="has no 'query_embeddings'"):
        objects(store)
    assert len(objects(store, key=None)) == 12
    with pytest.raises(ValueError, match="key is 'encoder_output'"):
        objects(store, key="encoder_output")
    with pytest.raises(KeyError, match="image 5 is not among"):
        objects(store, image_ids=[5], key=None)
