from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from store_factory import edit_metadata, make_store, plain

from detr_lightning.format import names
from detr_lightning.format.keys import KEYS
from detr_lightning.store import EmbeddingStore


def test_a_store_is_a_mapping_from_ids_to_tensors(store: EmbeddingStore) -> None:
    assert len(store) == 4
    assert list(store) == store.image_ids == [7, 17, 27, 37]
    assert 17 in store
    assert 18 not in store
    assert store.embedding_keys == KEYS
    assert store.categories == {1: "person", 3: "car", 18: "dog"}
    assert store.metadata["num_images"] == 4
    assert store.entry(17).file_name == "000000000017.jpg"
    assert "4 images" in repr(store)
    for image_id in store:
        expected = plain(store, image_id)
        found = store[image_id]
        assert list(found) == list(expected)
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=0)


def test_feature_maps_are_row_major(store: EmbeddingStore) -> None:
    ((height, width),) = store.entry(7).features.levels
    tensors = plain(store, 7)
    encoder = store.feature_map(7)
    assert encoder.shape == (16, height, width)
    assert torch.equal(encoder[:, 2, 3], tensors["encoder_output"][2 * width + 3])
    attention = store.feature_map(7, "cross_attention")
    assert attention.shape == (3, 10, height, width)
    assert torch.equal(attention[1, 4, 2, 3], tensors["cross_attention"][1, 4, 2 * width + 3])
    layers = store.feature_map(7, "encoder_layers")
    assert torch.equal(layers[1, :, 2, 3], tensors["encoder_layers"][1, 2 * width + 3])
    assert torch.equal(store.feature_map(7, "backbone_features"), tensors["backbone_features"])
    with pytest.raises(ValueError, match="key is 'query_embeddings'"):
        store.feature_map(7, "query_embeddings")


def test_reading_does_not_import_lightning_or_pandas(store: EmbeddingStore) -> None:
    code = (
        "import sys; from detr_lightning.store import EmbeddingStore; "
        f"EmbeddingStore({str(store.folder)!r}).stack('query_embeddings'); "
        "print([name for name in ('lightning', 'pandas', 'matplotlib', 'torchvision') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_folders_that_are_no_finished_extraction(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        EmbeddingStore(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"no metadata\.json"):
        EmbeddingStore(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match="is a file"):
        EmbeddingStore(tmp_path / "file")
    store = make_store(tmp_path / "store")
    (store.folder / names.STATE).mkdir()
    assert len(EmbeddingStore(store.folder)) == 4
    (store.folder / names.STATE / names.RUN).touch()
    with pytest.raises(FileNotFoundError, match=r"unfinished.*Run the same command again"):
        EmbeddingStore(store.folder)
    (store.folder / names.STATE / names.RUN).unlink()
    (store.folder / names.STATE).rmdir()
    (store.folder / names.METADATA).unlink()
    with pytest.raises(FileNotFoundError, match=r"unfinished.*Run the same command again"):
        EmbeddingStore(store.folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "lacks image_ids, num_images"),
        ('{"name": "another", "image_ids": []}', "another program, or is too old: it lacks num_images, extract_type"),
    ],
)
def test_foreign_metadata(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / names.METADATA).write_text(content)
    with pytest.raises(ValueError, match=message):
        EmbeddingStore(tmp_path)


def test_metadata_that_contradicts_itself(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    for changes, message in [
        ({"image_ids": [7, 17]}, "does not list the images"),
        ({"image_ids": ["7"]}, "not a list of image ids"),
        ({"image_ids": [10**12]}, "not a list of image ids"),
        ({"images": {}}, "not a list of objects"),
        ({"embedding_keys": "query_embeddings"}, "not a list of names"),
    ]:
        kept = (store.folder / names.METADATA).read_bytes()
        edit_metadata(store.folder, **changes)
        with pytest.raises(ValueError, match=message):
            EmbeddingStore(store.folder)
        (store.folder / names.METADATA).write_bytes(kept)
