from __future__ import annotations

from pathlib import Path

import pytest
import torch
from store_factory import make_store

from detr_lightning.format.keys import EXTRACT_TYPES
from detr_lightning.store import EmbeddingStore


def test_unknown_ids_name_the_nearest(store: EmbeddingStore) -> None:
    with pytest.raises(KeyError) as caught:
        store[19]
    assert str(caught.value).startswith("image 19 is not among the 4 images of")
    assert "The nearest ids: 17, 27, 7." in str(caught.value)
    assert store.entry(torch.tensor(17)) == store.entry(17)
    assert torch.tensor(17) in store
    assert "17" not in store
    with pytest.raises(KeyError, match="'139' is not an image id"):
        store["139"]
    with pytest.raises(KeyError, match="image 1000"):
        store.stack("query_embeddings", image_ids=[7, 1000])


def test_missing_keys_name_those_there_are(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", keys=EXTRACT_TYPES["encoder"])
    with pytest.raises(ValueError, match="no 'query_embeddings', only encoder_output, pred_logits, pred_boxes"):
        store.stack("query_embeddings")


def test_where_an_image_is(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    with pytest.raises(FileNotFoundError, match="Give image_dir"):
        store.image_path(7)
    with pytest.raises(FileNotFoundError, match="Give image_dir"):
        store.image_path(7, tmp_path)
    (tmp_path / "000000000007.jpg").touch()
    assert store.image_path(7, tmp_path) == tmp_path / "000000000007.jpg"
