from __future__ import annotations

from pathlib import Path

import pytest
import torch
from store_factory import make_store, plain

from detr_lightning.store import EmbeddingStore


def test_stack_equals_the_plain_loop(store: EmbeddingStore) -> None:
    ids, stacked = store.stack("query_embeddings")
    assert ids == store.image_ids
    assert torch.equal(stacked, torch.stack([plain(store, image_id)["query_embeddings"] for image_id in ids]))


def test_stack_keeps_the_order_of_the_chosen_ids(store: EmbeddingStore) -> None:
    ids, stacked = store.stack("decoder_output", image_ids=[37, 7])
    assert ids == [37, 7]
    assert torch.equal(stacked[0], plain(store, 37)["decoder_output"])
    assert stacked.shape == (2, 3, 10, 16)


@pytest.mark.parametrize(
    ("key", "shape", "axes"),
    [
        ("backbone_features", (512,), (1, 2)),
        ("encoder_output", (16,), (0,)),
        ("query_embeddings", (16,), (0,)),
        ("decoder_output", (3, 16), (1,)),
        ("encoder_layers", (2, 16), (1,)),
    ],
)
def test_pooling(store: EmbeddingStore, key: str, shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
    ids, mean = store.stack(key, pool="mean")
    _, largest = store.stack(key, pool="max")
    assert mean.shape == largest.shape == (4, *shape)
    for row, image_id in enumerate(ids):
        tensor = plain(store, image_id)[key]
        torch.testing.assert_close(mean[row], tensor.mean(axes))
        torch.testing.assert_close(largest[row], tensor.amax(axes))


def test_pooling_float16_is_done_in_float32(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", dtype="float16")
    ids, mean = store.stack("encoder_output", pool="mean")
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean[0], plain(store, ids[0])["encoder_output"].float().mean(0))


def test_a_progress_bar_on_request_only_for_short_work(
    store: EmbeddingStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store.stack("query_embeddings")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("detr_lightning.parallel.LONG_FILES", 3)
    monkeypatch.setenv("FORCE_COLOR", "1")
    store.stack("query_embeddings")
    assert "Reading query_embeddings" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr("detr_lightning.parallel.LONG_SECONDS", -1.0)
    monkeypatch.setenv("FORCE_COLOR", "1")
    store.stack("query_embeddings")
    assert "Reading query_embeddings" in capsys.readouterr().err


def test_mixed_shapes_name_two_images_and_offer_pooling(store: EmbeddingStore) -> None:
    expected = r"image 7 has shape \[512, 8, 10\] and of image 17 \[512, 10, 8\].*pool='mean' or 'max'"
    with pytest.raises(ValueError, match=expected):
        store.stack("backbone_features")


def test_wrong_pooling_and_empty_choices(store: EmbeddingStore) -> None:
    with pytest.raises(ValueError, match="pool is 'sum'"):
        store.stack("query_embeddings", pool="sum")
    with pytest.raises(ValueError, match="pred_boxes cannot be pooled"):
        store.stack("pred_boxes", pool="mean")
    with pytest.raises(ValueError, match=r"No image of .* was chosen"):
        store.stack("query_embeddings", image_ids=[])
