"""Detections of a store, and how many of each category it has."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from store_factory import CATEGORIES, annotations_of, make_store, plain

from detr_lightning import EmbeddingStore
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
