from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from store_factory import annotations_of, edit_metadata, make_store
from torch.utils.data import DataLoader

from detr_lightning.format import names
from detr_lightning.format.keys import EXTRACT_TYPES, KEYS
from detr_lightning.format.reader import TensorReader
from detr_lightning.store import EmbeddingStore


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    return make_store(tmp_path / "store", keys=KEYS)


def plain(store: EmbeddingStore, image_id: int) -> dict[str, torch.Tensor]:
    """What a user reads without this package."""
    return torch.load(store.folder / f"embedding_{image_id:012d}.pt")


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


def test_single_tensors_are_read_from_any_file_that_torch_reads(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", annotations_of(3), keys=("query_embeddings", "pred_boxes"))
    reader = TensorReader()
    base = torch.arange(40.0)
    for number, tensors in enumerate(
        [
            {"query_embeddings": base[10:20], "pred_boxes": base[:10]},  # One storage for both.
            {"query_embeddings": base.reshape(4, 10).T, "pred_boxes": torch.zeros(3)},  # Not contiguous.
            {"pred_boxes": torch.zeros(3), "query_embeddings": torch.arange(6)},  # Another order and dtype.
            {"query_embeddings": torch.zeros(0, 4), "pred_boxes": torch.zeros(3)},
        ]
    ):
        path = tmp_path / f"other_{number}.pt"
        torch.save(tensors, path)
        for _ in range(2):
            assert torch.equal(reader.read(path, "query_embeddings"), tensors["query_embeddings"])
    legacy = tmp_path / "legacy.pt"
    torch.save({"query_embeddings": base}, legacy, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"legacy\.pt does not read"):  # Cannot be mapped; none of ours is like it.
        reader.read(legacy, "query_embeddings")
    assert len(store) == 3


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


def test_reading_does_not_import_lightning_or_pandas(store: EmbeddingStore) -> None:
    code = (
        "import sys; from detr_lightning.store import EmbeddingStore; "
        f"EmbeddingStore({str(store.folder)!r}).stack('query_embeddings'); "
        "print([name for name in ('lightning', 'pandas', 'matplotlib', 'torchvision') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_unknown_ids_name_the_nearest(store: EmbeddingStore) -> None:
    with pytest.raises(KeyError) as caught:
        store[19]
    assert str(caught.value).startswith("image 19 is not among the 4 images of")
    assert "The nearest ids: 17, 27, 7." in str(caught.value)
    assert store.entry(torch.tensor(17)) == store.entry(17)
    assert torch.tensor(17) in store
    assert "17" not in store
    with pytest.raises(KeyError, match="'139' is no image id"):
        store["139"]  # type: ignore[index]
    with pytest.raises(KeyError, match="image 1000"):
        store.stack("query_embeddings", image_ids=[7, 1000])


def test_missing_keys_name_those_there_are(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", keys=EXTRACT_TYPES["encoder"])
    with pytest.raises(ValueError, match="no 'query_embeddings', only encoder_output, pred_logits, pred_boxes"):
        store.stack("query_embeddings")


def test_mixed_shapes_name_two_images_and_offer_pooling(store: EmbeddingStore) -> None:
    expected = r"backbone_features of image 7 is \[512, 8, 10\] and of image 17 \[512, 10, 8\].*pool='mean' or 'max'"
    with pytest.raises(ValueError, match=expected):
        store.stack("backbone_features")


def test_wrong_pooling_and_empty_choices(store: EmbeddingStore) -> None:
    with pytest.raises(ValueError, match="pool is 'sum'"):
        store.stack("query_embeddings", pool="sum")
    with pytest.raises(ValueError, match="pred_boxes cannot be pooled"):
        store.stack("pred_boxes", pool="mean")
    with pytest.raises(ValueError, match=r"No image of .* was chosen"):
        store.stack("query_embeddings", image_ids=[])


def test_a_missing_or_damaged_file_is_named(store: EmbeddingStore) -> None:
    store.path(7).unlink()
    store.path(17).write_bytes(store.path(17).read_bytes()[:1000])
    with pytest.raises(FileNotFoundError, match=r"embedding_000000000007\.pt is gone.*verify"):
        store.stack("query_embeddings")
    for read in (lambda: store[17], lambda: store.load(17, "query_embeddings")):
        with pytest.raises(ValueError, match=r"embedding_000000000017\.pt does not read.*verify"):
            read()


def test_where_an_image_is(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    with pytest.raises(FileNotFoundError, match="Give image_dir"):
        store.image_path(7)
    with pytest.raises(FileNotFoundError, match="Give image_dir"):
        store.image_path(7, tmp_path)
    (tmp_path / "000000000007.jpg").touch()
    assert store.image_path(7, tmp_path) == tmp_path / "000000000007.jpg"


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
        ('{"name": "another", "image_ids": []}', "another program's or too old: it lacks num_images, extract_type"),
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
