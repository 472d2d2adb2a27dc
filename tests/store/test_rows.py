"""All queries of all images as the rows of one tensor."""

from __future__ import annotations

import pytest
import torch

from detr_lightning.store import EmbeddingStore


def test_rows_are_the_queries_of_each_image_in_turn(store: EmbeddingStore) -> None:
    rows = store.rows("query_embeddings")
    count = len(store[7]["query_embeddings"])
    assert rows.image_ids.tolist() == [image_id for image_id in store for _ in range(count)]
    assert rows.queries.tolist() == [*range(count)] * len(store)
    assert torch.equal(rows.values, torch.cat([store[image_id]["query_embeddings"] for image_id in store]))


def test_chosen_images_come_in_the_order_given(store: EmbeddingStore) -> None:
    chosen = [17, 7]
    rows = store.rows("pred_logits", chosen)
    assert rows.image_ids.unique_consecutive().tolist() == chosen
    assert torch.equal(rows.values, torch.cat([store[image_id]["pred_logits"] for image_id in chosen]))


def test_a_key_without_queries_has_no_rows(store: EmbeddingStore) -> None:
    with pytest.raises(ValueError, match="encoder_output"):
        store.rows("encoder_output")
