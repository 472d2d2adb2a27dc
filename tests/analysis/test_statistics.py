from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest

from detr_lightning.analysis import statistics
from detr_lightning.analysis.statistics import by_group, precision_at_k, probe, typicality


def rows(images: int, objects: int = 1, seed: int = 0) -> pd.DataFrame:
    """Return objects of which each image's are all found or all missed, half of the images in each group."""
    random = np.random.default_rng(seed)
    found = random.integers(0, 2, images).astype(bool)
    table = pd.DataFrame({"image_id": np.arange(images), "found": found, "size": np.arange(images) % 2})
    return table.loc[np.repeat(np.arange(images), objects)].reset_index(drop=True)


def test_the_interval_is_that_of_images_not_of_objects() -> None:
    table = rows(400)
    summary = by_group(table, "size", "found").summary
    assert summary.objects.tolist() == summary.images.tolist() == [200, 200]
    means = table.groupby("size").found.mean()
    assert summary["mean"].tolist() == pytest.approx(means.tolist())
    for group in (0, 1):
        half = 1.96 * np.sqrt(means[group] * (1 - means[group]) / 200)  # Of a mean of 200 independent images.
        assert summary.low[group] == pytest.approx(means[group] - half, abs=0.015)
        assert summary.high[group] == pytest.approx(means[group] + half, abs=0.015)
    many = by_group(rows(400, objects=7), "size", "found").summary
    assert many[["mean", "low", "high"]].equals(summary[["mean", "low", "high"]])
    assert many.objects.tolist() == [1400, 1400]


def test_draws_do_not_depend_on_the_size_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = by_group(rows(50), "size", "found", draws=100).draws
    monkeypatch.setattr(statistics, "_CELLS", 50 * 7)
    assert by_group(rows(50), "size", "found", draws=100).draws.equals(whole)


def test_a_group_in_one_image_has_no_interval() -> None:
    table = rows(20, objects=3)
    table["size"] = np.where(table.image_id == 5, "rare", "common")
    means = by_group(table, "size", "found")
    assert means.summary.images.to_dict() == {"common": 19, "rare": 1}
    assert means.summary.loc["rare", ["low", "high"]].isna().all()
    assert means.summary.loc["common", ["low", "high"]].notna().all()
    gap, low, high = means.difference("common", "rare")
    assert gap == pytest.approx(means.summary["mean"]["common"] - means.summary["mean"]["rare"])
    assert np.isnan([low, high]).all()


def test_the_interval_of_a_difference_uses_the_same_draws() -> None:
    table = rows(100)
    # The same images in both groups: one group is the other plus a constant, so their difference does not vary.
    pair = pd.concat(
        [table.assign(size="one", found=table.found + 0.5), table.assign(size="two", found=table.found + 0)]
    )
    assert by_group(pair, "size", "found").difference("one", "two") == pytest.approx((0.5, 0.5, 0.5))
    means = by_group(table, "size", "found")
    gap, low, high = means.difference(0, 1)
    assert low < gap < high
    assert (low, high) == pytest.approx(tuple((means.draws[0] - means.draws[1]).quantile([0.025, 0.975])))


@pytest.mark.parametrize("name", ["value", "sum", "group"])
def test_a_column_of_any_name_can_be_grouped(name: str) -> None:
    table = rows(20, objects=3).astype({"found": float})
    table.index = np.arange(60) // 2  # Tables may have been concatenated.
    table.loc[[4, 5], "found"] = np.nan  # Four objects.
    expected = by_group(table, "size", "found")
    assert expected.summary.objects.sum() == 56
    means = by_group(table.rename(columns={"size": name}), name, "found")
    assert means.summary.index.name == name
    pd.testing.assert_frame_equal(means.summary, expected.summary, check_names=False)
    assert means.difference(0, 1) == expected.difference(0, 1)


def test_images_can_be_groups() -> None:
    table = rows(6, objects=3)
    summary = by_group(table, "image_id", "found").summary
    assert summary.images.tolist() == [1] * 6
    assert summary["mean"].tolist() == table.groupby("image_id").found.mean().tolist()


def test_an_empty_table_has_no_groups() -> None:
    means = by_group(rows(5)[:0], "size", "found")
    assert means.summary.empty
    assert list(means.summary) == ["objects", "images", "mean", "low", "high"]
    with pytest.raises(ValueError, match="no column 'light', only image_id, found, size"):
        by_group(rows(5), "light", "found")
    with pytest.raises(ValueError, match="level is 95"):
        by_group(rows(5), "size", "found", level=95)


def test_probes_are_tested_on_images_that_they_have_not_seen() -> None:
    random = np.random.default_rng(0)
    images = np.repeat(np.arange(40), 6)
    by_image = np.repeat(random.integers(0, 2, 40), 6)  # One label for each image ...
    place = np.repeat(random.normal(size=(40, 30)), 6, axis=0)  # ... which features that know the image give away.
    accuracy = probe({"image": place, "label": by_image[:, None] + random.normal(size=(240, 1)) / 9}, by_image, images)
    assert accuracy.shape == (5, 2)
    assert accuracy["label"].mean() == 1
    assert accuracy["image"].mean() < 0.75


def test_probes_that_cannot_be() -> None:
    features = {"a": np.zeros((6, 2))}
    with pytest.raises(ValueError, match="3 images cannot be split into 5 folds"):
        probe(features, [0, 1] * 3, [1, 1, 2, 2, 3, 3])
    with pytest.raises(ValueError, match="folds is 1, but must be at least 2"):
        probe(features, [0, 1] * 3, [1, 1, 2, 2, 3, 3], folds=1)
    with pytest.raises(ValueError, match="but has 1"):
        probe(features, [0] * 6, range(6))
    with pytest.raises(ValueError, match="a has 6 rows, for 5 labels"):
        probe(features, [0, 1, 0, 1, 0], range(5))


@pytest.mark.parametrize("other_images", [True, False])
def test_precision_is_that_of_the_nearest(monkeypatch: pytest.MonkeyPatch, other_images: bool) -> None:
    random = np.random.default_rng(0)
    vectors = random.normal(size=(30, 4)).astype(np.float32)
    table = pd.DataFrame({"image_id": np.arange(30) // 3, "category_id": np.arange(30) % 4, "embedding": list(vectors)})
    table.index += 100
    monkeypatch.setattr(statistics, "_CELLS", 100)  # A few rows at a time.
    found = precision_at_k(table, (1, 4, 99), other_images=other_images)
    assert found.index.equals(table.index)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for place, row in enumerate(table.itertuples()):
        others = [
            other
            for other in np.argsort(-unit @ unit[place])
            if other != place and not (other_images and other // 3 == place // 3)
        ]
        for k in (1, 4, 99):
            hits = [table.category_id.iloc[other] == row.category_id for other in others[:k]]
            assert found[f"precision at {k}"].iloc[place] == pytest.approx(np.mean(hits))


def test_precision_without_neighbours() -> None:
    table = pd.DataFrame({"image_id": [1, 1], "category_id": [3, 3], "embedding": [np.ones(2), np.ones(2)]})
    assert precision_at_k(table, [5]).isna().all(axis=None)
    assert precision_at_k(table, [5], other_images=False)["precision at 5"].tolist() == [1, 1]
    assert list(precision_at_k(table[:0])) == ["precision at 1", "precision at 5", "precision at 10"]
    with pytest.raises(ValueError, match="ks is"):
        precision_at_k(table, [0])


def test_typicality_leaves_the_object_itself_out() -> None:
    vectors = np.array([[3, 0], [0, 1], [0, 2], [5, 5]], np.float32)
    table = pd.DataFrame({"category_id": [7, 7, 7, 8], "embedding": list(vectors)}, index=[9, 8, 7, 6])
    found = typicality(table)
    assert found.index.tolist() == [9, 8, 7, 6]
    # The first against two that point up; the second against the mean of right and up.
    assert found.tolist()[:3] == pytest.approx([0, np.sqrt(0.5), np.sqrt(0.5)])
    assert np.isnan(found[6])
    assert typicality(table[:0]).empty


@pytest.mark.parametrize("labels", [["cat", None, "cat", None, "dog"], pd.array([1, None, 1, None, 2], "Int64")])
def test_objects_without_a_label_are_no_neighbours(labels: Sequence[Any]) -> None:
    vectors = [np.array([1, angle], np.float32) for angle in (0, 0.1, 0.3, 0.2, 0.5)]
    table = pd.DataFrame({"image_id": range(5), "name": labels, "embedding": vectors})
    table.index = [0, 0, 1, 1, 2]  # Tables may have been concatenated.
    known = table[table.name.notna()]
    found = precision_at_k(table, (1, 2, 9), "name")
    assert found[table.name.isna()].isna().all(axis=None)
    assert found[table.name.notna()].equals(precision_at_k(known, (1, 2, 9), "name"))
    typical = typicality(table, "name")
    assert typical[table.name.isna()].isna().all()
    assert typical[table.name.notna()].equals(typicality(known, "name"))
    none = table.assign(name=None)
    assert precision_at_k(none, (1,), "name").isna().all(axis=None)
    assert typicality(none, "name").isna().all()
