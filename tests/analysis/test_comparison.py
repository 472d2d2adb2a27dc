from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from store_factory import annotations_of, make_store

from detr_lightning.analysis.comparison import align, compare
from detr_lightning.analysis.objects import objects
from detr_lightning.analysis.vectors import linear_cka
from detr_lightning.format.keys import KEYS
from detr_lightning.store import EmbeddingStore


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    return make_store(tmp_path / "store", keys=KEYS)


def test_cka_sees_through_rotation_and_scale() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(50, 6))
    rotation, _ = np.linalg.qr(random.normal(size=(6, 6)))
    other = random.normal(size=(50, 9))
    for debiased in (False, True):
        values = linear_cka([x, other], [3 * x @ rotation + 5, other], debiased)
        assert values[0, 0] == pytest.approx(1)
        assert values[1, 1] == pytest.approx(1)
        assert values[0, 1] < 0.5
    gram = [m @ m.T for m in (x - x.mean(0), other - other.mean(0))]
    expected = (gram[0] * gram[1]).sum() / np.sqrt((gram[0] ** 2).sum() * (gram[1] ** 2).sum())
    assert linear_cka([x], [other])[0, 0] == pytest.approx(expected)


def test_with_few_rows_only_the_debiased_cka_tells_strangers_apart() -> None:
    random = np.random.default_rng(0)
    x, y = random.normal(size=(2, 20, 500))
    assert linear_cka([x], [y])[0, 0] > 0.9
    assert abs(linear_cka([x], [y], debiased=True)[0, 0]) < 0.1
    with pytest.raises(ValueError, match="at least 4"):
        linear_cka([x[:3]], [y[:3]], debiased=True)
    with pytest.raises(ValueError, match=r"these have \[19, 20\]"):
        linear_cka([x], [y[1:]])


def test_objects_of_two_extractions_are_paired_by_place(store: EmbeddingStore) -> None:
    table = objects(store)
    moved = table.copy()
    moved.loc[2, ["x1", "x2"]] += 1000  # Elsewhere.
    moved.loc[4, "category_id"] = 99  # Another name, the same place.
    shuffled = moved.sample(frac=1, random_state=0)
    pairs = align(table, shuffled)
    assert pairs["one"].tolist() == [0, 1, *range(3, 12)]
    assert shuffled.index[pairs["other"]].tolist() == pairs["one"].tolist()
    assert pairs.iou.tolist() == pytest.approx([1] * 11)
    assert align(table[:0], table).empty
    with pytest.raises(ValueError, match=r"share no image: one has '000000000007\.jpg', the other 'a\.jpg'"):
        align(table, table.assign(file_name="a.jpg"))


def test_layers_of_two_extractions(tmp_path: Path) -> None:
    content = annotations_of(12)
    one = make_store(tmp_path / "one", content)
    other = make_store(tmp_path / "other", content, seed=1, hidden_dim=24, decoder_layers=2)
    last = make_store(tmp_path / "last", content, keys=("query_embeddings", "pred_logits", "pred_boxes"))
    same = compare(one, one)
    assert same.shape == (3, 3)
    assert np.diagonal(same) == pytest.approx(1)
    assert same.attrs["objects"] == 36
    across = compare(one, other)
    assert list(across.index) == ["decoder 1", "decoder 2", "decoder 3"]
    assert list(across.columns) == ["decoder 1", "decoder 2"]
    # Both gather around their categories, the later layers more closely.
    assert 0.2 < across.loc["decoder 3", "decoder 2"] < 0.999
    assert compare(last, last).loc["decoder", "decoder"] == pytest.approx(1)
    assert compare(one, last).shape == (3, 1)
    with pytest.warns(UserWarning, match="scores 1"), pytest.raises(ValueError, match="0 objects were found in both"):
        compare(one, other, threshold=1.0)
