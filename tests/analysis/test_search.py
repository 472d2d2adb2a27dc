from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from store_factory import annotations_of, make_store

from detr_lightning.analysis.objects import objects, write, write_objects
from detr_lightning.analysis.search import ObjectSearch


def clustered(path: Path, rows: int = 3000, seed: int = 0) -> np.ndarray:
    """Write a table with vectors around 30 centres, and return them."""
    random = np.random.default_rng(seed)
    vectors = random.normal(size=(30, 16))[np.arange(rows) % 30] + 0.3 * random.normal(size=(rows, 16))
    vectors = vectors.astype(np.float32)
    write(pd.DataFrame({"image_id": np.arange(rows), "category": "cat", "embedding": list(vectors)}), path)
    return vectors


def cosines(vectors: np.ndarray, queries: np.ndarray) -> np.ndarray:
    one, other = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, vectors))
    return one @ other.T


@pytest.mark.parametrize("at_once", [1, 40, 2**26])
def test_the_nearest_by_cosine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr("detr_lightning.analysis.search.COMPARED_AT_ONCE", at_once)
    store = make_store(tmp_path / "store", annotations_of(6))
    path = write_objects(store, tmp_path / "objects.parquet")
    table = objects(store)
    queries = np.stack(table.embedding)[[4, 9]] * 7  # The length of a query does not matter.
    found = ObjectSearch(path).search(queries, k=5)
    expected = cosines(np.stack(table.embedding), queries)
    order = np.argsort(-expected, axis=1)[:, :5]
    assert found.search.tolist() == [0] * 5 + [1] * 5
    assert found["rank"].tolist() == [1, 2, 3, 4, 5] * 2
    assert found.similarity.tolist() == pytest.approx(np.take_along_axis(expected, order, 1).flatten())
    for name in ("image_id", "file_name", "query", "category"):
        assert found[name].tolist() == table[name].iloc[order.flatten()].tolist()
    assert "embedding" not in found
    assert len(ObjectSearch(path).search(queries[:1], k=99)) == len(table)


def test_an_empty_table_has_no_neighbours(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    with pytest.warns(UserWarning, match="No query of"):
        streamed = write_objects(store, tmp_path / "objects.parquet", 1.0)
    with pytest.warns(UserWarning, match="No query of"):
        written = write(objects(store, 1.0), tmp_path / "frame.parquet")
    for path in (streamed, written):
        assert ObjectSearch(path).search(np.ones(16)).empty


def test_tables_whose_vectors_cannot_be_compared(tmp_path: Path) -> None:
    table = objects(make_store(tmp_path / "store"))
    table.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"embeddings of type list<element: float>, not vectors .* Write the table"):
        ObjectSearch(tmp_path / "a.parquet")
    missed = write(table.assign(embedding=None), tmp_path / "missed.parquet")
    with pytest.raises(ValueError, match="objects without an embedding, since they were missed"):
        ObjectSearch(missed)


def test_the_index_finds_nearly_all_and_is_made_once(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    vectors = clustered(tmp_path / "a.parquet")
    queries = vectors[::100] + 0.01
    exact = ObjectSearch(tmp_path / "a.parquet").search(queries)
    indexed = ObjectSearch(tmp_path / "a.parquet", exact=False).search(queries)
    shared = [
        len({*exact.image_id[exact.search == number]} & {*indexed.image_id[indexed.search == number]})
        for number in range(len(queries))
    ]
    assert np.mean(shared) > 9.5  # Of ten.
    nearest = indexed[indexed["rank"] == 1]
    assert nearest.similarity.tolist() == pytest.approx(cosines(vectors, queries).max(1).tolist(), abs=1e-5)
    path = tmp_path / "a.index.npz"
    made = path.stat().st_mtime_ns
    again = ObjectSearch(tmp_path / "a.parquet", exact=False).search(queries)
    assert again.equals(indexed)
    assert path.stat().st_mtime_ns == made


def test_an_index_of_other_vectors_is_not_used(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    clustered(tmp_path / "a.parquet", 500)
    before = ObjectSearch(tmp_path / "a.parquet", exact=False).search(np.ones(16))
    vectors = clustered(tmp_path / "a.parquet", 500, seed=1)  # The same file, as large, with other vectors.
    after = ObjectSearch(tmp_path / "a.parquet", exact=False).search(np.ones(16))
    assert after.similarity[0] == pytest.approx(cosines(vectors, np.ones((1, 16))).max(), abs=1e-5)
    assert after.similarity[0] != before.similarity[0]
    (tmp_path / "a.index.npz").write_bytes(b"PK\x03\x04 and nothing more")
    with pytest.raises(ValueError, match=r"damaged .* Remove it"):
        ObjectSearch(tmp_path / "a.parquet", exact=False)


def test_large_tables_ask_for_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clustered(tmp_path / "a.parquet", 50)
    monkeypatch.setattr("detr_lightning.analysis.search.EXACT_ROWS", 50)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"pip install 'detr-lightning\[search\]'.*--exact"):
        ObjectSearch(tmp_path / "a.parquet")
    assert len(ObjectSearch(tmp_path / "a.parquet", exact=True).search(np.ones(16))) == 10


def test_what_cannot_be_searched(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="detr-lightning objects"):
        ObjectSearch(tmp_path / "none.parquet")
    (tmp_path / "a.parquet").write_text("text")
    with pytest.raises(ValueError, match="not a Parquet file"):
        ObjectSearch(tmp_path / "a.parquet")
    store = make_store(tmp_path / "store")
    with pytest.raises(ValueError, match="no column embedding"):
        ObjectSearch(write_objects(store, tmp_path / "b.parquet", key=None))
    search = ObjectSearch(write_objects(store, tmp_path / "c.parquet"))
    with pytest.raises(ValueError, match=r"the query has 5 dimensions, but the vectors of .* have 16"):
        search.search(np.ones(5))
    with pytest.raises(ValueError, match="k is 0"):
        search.search(np.ones(16), k=0)
