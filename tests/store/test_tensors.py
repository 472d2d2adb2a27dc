"""Single tensors out of files of many."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from store_factory import annotations_of, make_store, plain

from detr_lightning.format.keys import KEYS
from detr_lightning.store import EmbeddingStore


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("key", KEYS)
def test_single_tensors_equal_those_of_the_whole_file(tmp_path: Path, key: str, dtype: str) -> None:
    store = make_store(tmp_path / "store", annotations_of(6), keys=KEYS, dtype=dtype)
    for image_id in [*store, *store]:  # The second time by the places that the first time found.
        tensor = store.load(image_id, key)
        expected = plain(store, image_id)[key]
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected)
        tensor.zero_()  # Memory of its own: the next read sees the file as it was.


def test_a_missing_or_damaged_file_is_named(store: EmbeddingStore) -> None:
    store.path(7).unlink()
    store.path(17).write_bytes(store.path(17).read_bytes()[:1000])
    with pytest.raises(FileNotFoundError, match=r"embedding_000000000007\.pt was removed.*verify"):
        store.stack("query_embeddings")
    for read in (lambda: store[17], lambda: store.load(17, "query_embeddings")):
        with pytest.raises(ValueError, match=r"embedding_000000000017\.pt cannot be read.*verify"):
            read()
