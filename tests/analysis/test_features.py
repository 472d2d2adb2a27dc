"""Features of objects from maps of the image and from the decoder's layers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from store_factory import annotations_of, make_store

from detr_lightning.analysis.features import object_features
from detr_lightning.analysis.matching import match
from detr_lightning.analysis.objects import objects
from detr_lightning.format.keys import KEYS
from detr_lightning.store import EmbeddingStore


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    return make_store(tmp_path / "store", keys=KEYS)


def test_features_of_a_box_are_those_of_its_places(store: EmbeddingStore) -> None:
    table = objects(store).sample(frac=1, random_state=0)  # In any order.
    entry = store.entry(7)
    height, width = store.feature_map(7).shape[-2:]
    # A box that covers the cells 2 to 3, 1 to 4 exactly: rows 1 and 2, columns 1 to 3.
    cell = entry.width / width, entry.height / height
    first = table.index[0]
    table.loc[first, ["image_id", "x1", "x2", "y1", "y2"]] = [7, cell[0], 4 * cell[0], cell[1], 3 * cell[1]]
    features = object_features(store, table)
    layers = [f"encoder {number}" for number in (1, 2)] + [f"decoder {number}" for number in (1, 2, 3)]
    assert list(features) == ["box", "backbone", "encoder", *layers]
    assert {len(matrix) for matrix in features.values()} == {len(table)}
    for name, key in (("backbone", "backbone_features"), ("encoder", "encoder_output")):
        expected = store.feature_map(7, key)[:, 1:3, 1:4].mean((1, 2))
        # Bilinear samples at 2 x 2 points inside each cell blend in its neighbours, on both sides alike.
        assert features[name][0] == pytest.approx(expected.numpy(), abs=0.5)
    for place, row in enumerate(table.itertuples()):
        hidden = store[row.image_id]["decoder_output"][:, row.query]
        for layer in (1, 2, 3):
            assert np.array_equal(features[f"decoder {layer}"][place], hidden[layer - 1].numpy())
    box = features["box"][1]
    row = table.iloc[1]
    size = store.entry(row.image_id)
    assert box == pytest.approx([row.x1 / size.width, row.y1 / size.height, row.x2 / size.width, row.y2 / size.height])


def test_the_mean_over_a_box_of_a_ramp_is_its_middle(tmp_path: Path) -> None:
    store = make_store(tmp_path / "ramp", annotations_of(1), keys=("encoder_output", "pred_logits", "pred_boxes"))
    height, width = store.feature_map(7).shape[-2:]
    columns = (torch.arange(width) + 0.5).expand(height, width)  # Each place holds its own x, at its centre.
    tensors = store[7]
    tensors["encoder_output"] = columns.reshape(-1, 1).expand(-1, 16).contiguous()
    torch.save(tensors, store.path(7))
    table = objects(EmbeddingStore(store.folder), key=None)
    inside = object_features(EmbeddingStore(store.folder), table, ["encoder_output"])["encoder"][:, 0]
    middle = (table.x1 + table.x2) / 2 / 640 * width
    assert inside == pytest.approx(middle.to_numpy(), abs=1e-4)


def test_features_of_missed_objects_are_refused(store: EmbeddingStore, tmp_path: Path) -> None:
    content = annotations_of()
    content["annotations"][0]["bbox"][0] += 1000
    (tmp_path / "instances.json").write_text(json.dumps(content))
    annotated = match(store, tmp_path / "instances.json").annotated
    with pytest.raises(ValueError, match="they were missed"):
        object_features(store, annotated)
    assert len(object_features(store, annotated[annotated.found], ["encoder_output"])["encoder"]) == 11
    assert object_features(store, annotated[:0]) == {}
    with pytest.raises(ValueError, match="keys is 'pred_boxes'"):
        object_features(store, annotated, ["pred_boxes"])
