"""Detections of a store, and how many of each category it has."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from store_factory import CATEGORIES, annotations_of, edit_metadata, make_store, plain

from detr_lightning import EmbeddingStore
from detr_lightning.batch import keep_queries
from detr_lightning.detections import coco_results
from detr_lightning.format.files import save_tensors
from detr_lightning.store.predictions import Predictions, count_categories


def test_detections_are_the_stored_logits_and_boxes_in_pixels(store: EmbeddingStore) -> None:
    predictions = Predictions(store)
    assert predictions.names == CATEGORIES
    for image_id in store:
        found, tensors = predictions[image_id], plain(store, image_id)
        scores, labels = tensors["pred_logits"].softmax(-1)[:, :-1].max(-1)
        assert torch.equal(found.labels, labels)
        torch.testing.assert_close(found.scores, scores)
    objects = [a for a in annotations_of()["annotations"] if a["image_id"] == 7]
    found = predictions[7]
    sure = found.scores >= 0.7
    assert Counter(found.labels[sure].tolist()) == Counter(a["category_id"] for a in objects)
    corners = sorted([x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in objects))
    torch.testing.assert_close(
        torch.tensor(sorted(found.boxes_xyxy[sure].tolist())), torch.tensor(corners), rtol=0, atol=1e-2
    )


def test_categories_are_counted(store: EmbeddingStore, tmp_path: Path) -> None:
    counts = count_categories(store)
    expected = Counter(CATEGORIES[a["category_id"]] for a in annotations_of()["annotations"])
    assert {count.name: count.objects for count in counts} == expected
    assert [count.objects for count in counts] == sorted(expected.values(), reverse=True)
    assert all(0.7 <= count.mean_score <= 1 for count in counts)
    assert count_categories(store, threshold=1.1) == []
    spread = count_categories(make_store(tmp_path / "many", annotations_of(10, 3)), limit=5)
    assert sum(count.objects for count in spread) == 5 * 3


def test_a_store_without_logits_is_refused(tmp_path: Path) -> None:
    without = make_store(tmp_path / "without", keys=["query_embeddings", "pred_boxes"])
    with pytest.raises(ValueError, match="pred_logits"):
        Predictions(without)


def test_the_best_detections_of_kept_queries_are_those_of_all(tmp_path: Path) -> None:
    """With sigmoid one query may give several detections, more than queries were kept."""
    full = make_store(tmp_path / "full")
    edit_metadata(full.folder, model={**full.metadata["model"], "scoring": "sigmoid"})
    full = EmbeddingStore(full.folder)
    min_score = 0.7
    entries = []
    (tmp_path / "kept").mkdir()
    for entry in full.metadata["images"]:
        tensors = full[entry["id"]]
        tensors["pred_logits"].fill_(-4)[2, :3] = torch.tensor([1.0, 2.0, 3.0])
        save_tensors(full.folder, entry["id"], tensors)
        kept = keep_queries(entry["id"], tensors, min_score, "sigmoid")
        save_tensors(tmp_path / "kept", entry["id"], kept)
        entries.append({**entry, "num_queries": len(kept["query_index"])})
    shutil.copy(full.folder / "metadata.json", tmp_path / "kept")
    keys = [*full.embedding_keys, "query_index"]
    edit_metadata(tmp_path / "kept", min_score=min_score, embedding_keys=keys, images=entries)
    part = EmbeddingStore(tmp_path / "kept")
    for image_id in full:
        all_rows, rows = (
            coco_results(image_id, Predictions(store, min_score).best(image_id), min_score) for store in (full, part)
        )
        assert rows == all_rows
        assert (len(rows), part.entry(image_id).num_queries) == (3, 1)
