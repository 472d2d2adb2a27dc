from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from store_factory import plain
from torch.utils.data import DataLoader

from detr_lightning.errors import SettingError
from detr_lightning.store import EmbeddingStore


def test_a_dataset_for_a_data_loader_with_workers(store: EmbeddingStore) -> None:
    targets = {image_id: image_id % 4 for image_id in (37, 7, 27)}
    dataset = store.dataset("query_embeddings", pool="mean", targets=targets)
    assert len(dataset) == 3
    batches = list(DataLoader(dataset, batch_size=2, num_workers=1))
    vectors = torch.cat([vector for vector, _ in batches])
    labels = torch.cat([label for _, label in batches])
    ids, expected = store.stack("query_embeddings", image_ids=[7, 27, 37], pool="mean")
    assert torch.equal(vectors, expected)
    assert labels.tolist() == [targets[image_id] for image_id in ids]


def test_a_dataset_is_small_when_pickled_and_gives_ids_without_targets(store: EmbeddingStore) -> None:
    dataset = pickle.loads(pickle.dumps(store.dataset("decoder_output", image_ids=[27, 7])))
    tensor, image_id = dataset[0]
    assert image_id == 27
    assert torch.equal(tensor, plain(store, 27)["decoder_output"])


def test_forked_workers_of_a_table_are_refused(store: EmbeddingStore, tmp_path: Path) -> None:
    """Lance has threads, so a forked worker may crash, or wait forever."""
    pytest.importorskip("lance", reason="pylance, of the extra lance, is not installed")
    from detr_lightning.store.convert import convert

    table = convert(store.folder, tmp_path / "table")
    table.stack("query_embeddings")
    loader = DataLoader(table.dataset("query_embeddings"), num_workers=1, multiprocessing_context="fork")
    with pytest.raises(SettingError, match="multiprocessing_context='spawn'"):
        list(loader)
