from __future__ import annotations

import contextlib
import os
import random
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from store_factory import annotations_of, edit_metadata, make_store, plain

from detr_lightning.format import files, names
from detr_lightning.format.keys import EXTRACT_TYPES, KEYS
from detr_lightning.format.reader import TensorReader
from detr_lightning.store import EmbeddingStore
from detr_lightning.store.__main__ import main
from detr_lightning.store.verify import verify


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    return make_store(tmp_path / "store")


def resave(store: EmbeddingStore, image_id: int, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Write an image's file again, changed, with its new size in the metadata: only the content is wrong."""
    tensors = store[image_id]
    change(tensors)
    saved = files.save_tensors(store.folder, image_id, tensors)._asdict()
    images = store.metadata["images"]
    edit_metadata(store.folder, images=[i | saved if i["id"] == image_id else i for i in images])


def without(name: str, content: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key != name}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("keys", [*EXTRACT_TYPES.values(), KEYS, ("pred_boxes", "query_embeddings")])
def test_a_right_folder_has_no_problems(tmp_path: Path, keys: tuple[str, ...], dtype: str) -> None:
    assert verify(make_store(tmp_path / "store", keys=keys, dtype=dtype).folder) == []


def test_no_images_at_all_is_right(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", annotations_of(0))
    assert verify(store.folder) == []
    assert main(["summary", str(store.folder)]) == 0


def test_any_flipped_byte_of_a_tensor_is_found(store: EmbeddingStore) -> None:
    path = store.path(17)
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        spans = [
            (info.header_offset + 128, info.header_offset + info.file_size)
            for info in archive.infolist()
            if "/data/" in info.filename
        ]
    generator = random.Random(0)
    for place in [generator.randrange(*span) for span in spans for _ in range(4)]:
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        problems = verify(store.folder)
        assert len(problems) == 1, place
        assert problems[0].startswith("embedding_000000000017.pt: is damaged: the checksum of archive/data/")


def test_damaged_foreign_and_missing_files(store: EmbeddingStore) -> None:
    whole = store.path(7).read_bytes()
    store.path(7).write_bytes(whole[:-100])
    store.path(17).unlink()
    torch.save([1], store.path(27))
    store.path(37).write_bytes(b"")
    problems = "\n".join(verify(store.folder))
    assert "007.pt: has" in problems
    assert "007.pt: is damaged and does not load" in problems
    assert "017.pt: missing." in problems
    assert "027.pt: not a dict of tensors." in problems
    assert "037.pt: is damaged and does not load" in problems


def test_files_that_do_not_belong(store: EmbeddingStore) -> None:
    (store.folder / "embedding_000000000099.pt").touch()
    (store.folder / ".embedding_7.abc.tmp").touch()
    (store.folder / "notes.txt").touch()
    assert verify(store.folder) == [
        ".embedding_7.abc.tmp: a temporary file that a killed run left behind. It can be deleted.",
        "embedding_000000000099.pt: its image is not in metadata.json.",
        "notes.txt: not a file of this extraction.",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("pred_boxes"), "its keys are"),
        (lambda t: t.update(pred_boxes=t.pop("pred_boxes"), query_embeddings=t.pop("query_embeddings")), "keys are"),
        (
            lambda t: t.update(encoder_output=t["encoder_output"][1:]),
            r"encoder_output has shape \[79, 16\], expected",
        ),
        (lambda t: t["encoder_output"].__setitem__((3, 4), torch.nan), "encoder_output has values that are not finite"),
        (lambda t: t["pred_logits"].__setitem__((3, 4), torch.inf), "pred_logits has values that are not finite"),
        (lambda t: t.update(pred_boxes=t["pred_boxes"].half()), "pred_boxes is torch.float16, expected torch.float32"),
        (lambda t: t["query_embeddings"].__setitem__((0, 0), 1.0), "query_embeddings are not the last layer"),
    ],
)
def test_wrong_contents(
    store: EmbeddingStore, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    resave(store, 27, change)
    problems = verify(store.folder)
    assert len(problems) == 1
    assert problems[0].startswith("embedding_000000000027.pt: ")
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(problems[0])


def test_float16_logits_are_a_problem_and_float32_embeddings_too(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    edit_metadata(store.folder, dtype="float16")
    assert any("query_embeddings is torch.float32, expected torch.float16" in line for line in verify(store.folder))


def test_metadata_that_disagrees(store: EmbeddingStore) -> None:
    kept = (store.folder / names.METADATA).read_bytes()
    for changes, message in [
        ({"num_images": 5}, "num_images is 5, but image_ids lists 4"),
        ({"extract_type": "some"}, "extract_type is 'some'"),
        ({"failed": [{"id": 17, "file_name": "17.jpg", "reason": "?"}]}, "image 17 is both extracted and failed"),
        ({"versions": None}, "versions is missing"),
        ({"model": {"architecture": {"block": "basic"}}}, "model.weights is missing"),
        ({"model": {"weights": "", "sha256": "", "architecture": {}}}, "model.architecture is incomplete"),
        ({"model": 3}, "model is 3, not of type dict"),
        ({"failed": [17]}, "failed: an image's entry is 17, not an object"),
        ({"images": list(reversed(store.metadata["images"])), "image_ids": [37, 27, 17, 7]}, "not ascending"),
        ({"images": [without("feature_size", image) for image in store.metadata["images"]]}, "no feature_size"),
        ({"images": [without("file_name", image) for image in store.metadata["images"]]}, "file_name is missing"),
    ]:
        edit_metadata(store.folder, **changes)
        problems = verify(store.folder)
        assert any(message in problem for problem in problems), (message, problems)
        (store.folder / names.METADATA).write_bytes(kept)


def test_the_command_says_what_is_wrong_and_exits_with_1(
    store: EmbeddingStore, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(store.folder)]) == 0
    assert "4 images; every file is complete and correct." in capsys.readouterr().out
    store.path(17).unlink()
    assert main(["verify", str(store.folder), "--workers", "2"]) == 1
    assert "embedding_000000000017.pt: missing.\n1 problem." in capsys.readouterr().err


@pytest.mark.parametrize("command", ["verify", "summary"])
def test_bad_folders_are_one_message(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / names.METADATA).write_text("{}")
    for folder in (tmp_path, tmp_path / "none", tmp_path / "foreign"):
        assert main([command, str(folder)]) == 1
        error = capsys.readouterr().err
        assert str(folder) in error
        assert "Traceback" not in error


def test_exchanged_contents_are_found(store: EmbeddingStore) -> None:
    first, other = store.path(7), store.path(27)  # of one size
    contents = first.read_bytes(), other.read_bytes()
    assert len(contents[0]) == len(contents[1])
    first.write_bytes(contents[1])
    other.write_bytes(contents[0])
    message = "is not the file that was written: its checksum differs from that in metadata.json."
    assert verify(store.folder) == [f"{path.name}: {message}" for path in (first, other)]
    other.write_bytes(contents[1])
    assert verify(store.folder) == [f"{first.name}: {message}"]
    zeros = {key: torch.zeros_like(tensor) for key, tensor in store[7].items()}
    files.save_tensors(store.folder, 7, zeros)
    assert verify(store.folder) == [f"{first.name}: {message}"]


def test_a_file_recorded_without_a_checksum_is_no_finding(store: EmbeddingStore) -> None:
    images = [without("checksum", image) for image in store.metadata["images"]]
    edit_metadata(store.folder, images=images)
    assert verify(store.folder) == []


@pytest.mark.parametrize("change", [("640", "641"), ('"dog"', '"cat"'), ('"width"', '"width" ')])
def test_edited_metadata_is_found(store: EmbeddingStore, change: tuple[str, str]) -> None:
    path = store.folder / names.METADATA
    text = path.read_text()
    assert change[0] in text
    path.write_text(text.replace(*change))
    assert verify(store.folder) == ["metadata.json: was changed after it was written: its checksum does not match."]


def test_values_outside_of_their_range(store: EmbeddingStore) -> None:
    resave(store, 27, lambda tensors: tensors["pred_boxes"].__setitem__((0, 0), 1.5))
    assert len(problems := verify(store.folder)) == 1
    assert "pred_boxes has values from " in problems[0]
    assert "to 1.5, outside of [0, 1]" in problems[0]


def overwrite(store: EmbeddingStore, image_id: int, content: object) -> None:
    """Write any content by torch itself, with its size in the metadata."""
    torch.save(content, store.path(image_id))
    size = store.path(image_id).stat().st_size
    images = [without("checksum", image) for image in store.metadata["images"]]
    edit_metadata(store.folder, images=[i | {"bytes": size} if i["id"] == image_id else i for i in images])


def odd_contents() -> dict[str, object]:
    deep: object = []
    for _ in range(50):
        deep = [deep]
    with warnings.catch_warnings():  # torch advises against some of these.
        warnings.simplefilter("ignore")
        quantised = torch.quantize_per_tensor(torch.rand(10, 16), 0.1, 0, torch.quint8)
        compressed = torch.eye(10).to_sparse_csr()
    return {
        "strides": {"query_embeddings": torch.rand(16, 10).T},
        "a view": {"query_embeddings": torch.rand(20, 16)[:10]},
        "sparse": {"query_embeddings": torch.eye(10).to_sparse()},
        "compressed sparse": {"query_embeddings": compressed},
        "quantised": {"query_embeddings": quantised},
        "complex": {"query_embeddings": torch.rand(10, 16, dtype=torch.complex64)},
        "empty": {"query_embeddings": torch.empty(0, 16)},
        "scalar": {"decoder_output": torch.tensor(1.0), "query_embeddings": torch.tensor(1.0)},
        "bool": {"pred_boxes": torch.ones(10, 4, dtype=torch.bool)},
        "integer keys": {1: torch.rand(3)},
        "nested": {"query_embeddings": deep},
        "nothing": {},
        "a list": [torch.rand(3)],
    }


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", odd_contents())
def test_any_content_is_a_finding_and_never_a_traceback(store: EmbeddingStore, name: str) -> None:
    overwrite(store, 17, odd_contents()[name])
    problems = verify(store.folder)
    assert problems
    assert all("017.pt: " in problem for problem in problems), problems
    assert not any("cannot be checked" in problem for problem in problems), problems
    try:
        store.load(17, "query_embeddings")
    except (ValueError, KeyError) as error:
        assert "017" in str(error)  # noqa: PT017 - some of them read


def test_shared_storage_is_a_finding(store: EmbeddingStore) -> None:
    tensors = store[17]
    tensors["query_embeddings"] = tensors["decoder_output"][-1]
    overwrite(store, 17, tensors)
    assert any("query_embeddings is not contiguous in its own storage" in line for line in verify(store.folder))


@pytest.mark.parametrize(
    "change",
    [
        {"image_ids": [1e400]},
        {"categories": [1]},
        {"categories": {"one": "a"}},
        {"model": {"weights": "a", "sha256": "b", "architecture": {"num_queries": [1]}}},
        {"extract_type": []},
        {"num_images": {}},
        {"failed": 3},
        {"embedding_keys": ["a\ud800"]},
        {"images": [{"id": i, "file_name": "\ud800", "width": 10**30, "height": -1} for i in (7, 17, 27, 37)]},
        {"config": {"data": 3}},
        {"preprocessing": None, "dtype": 3},
        {"min_score": "high"},
    ],
)
def test_odd_metadata_is_a_finding_and_never_a_traceback(
    store: EmbeddingStore, change: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    edit_metadata(store.folder, **change)
    problems = verify(store.folder)
    assert change in ({"failed": 3}, {"config": {"data": 3}}) or problems
    assert main(["verify", str(store.folder)]) == (1 if problems else 0)
    assert main(["summary", str(store.folder)]) in (0, 1)
    assert "Traceback" not in capsys.readouterr().err


def test_deeply_nested_metadata_is_an_error(store: EmbeddingStore) -> None:
    path = store.folder / names.METADATA
    path.write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    assert "is not JSON" in verify(store.folder)[0]


def test_a_zip_bomb_is_not_unpacked(store: EmbeddingStore, monkeypatch: pytest.MonkeyPatch) -> None:
    path = store.path(17)
    with zipfile.ZipFile(path) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, bytes(50_000_000) if name.endswith("/data/0") else content)
    images = store.metadata["images"]
    size = {"bytes": path.stat().st_size}
    edit_metadata(store.folder, images=[without("checksum", i) | (size if i["id"] == 17 else {}) for i in images])
    monkeypatch.setattr(zipfile.ZipFile, "open", None)
    monkeypatch.setattr(torch, "load", None)
    for read in (lambda: store[17], lambda: store.load(17, "pred_boxes")):
        with pytest.raises(ValueError, match="is compressed"):
            read()
    monkeypatch.undo()
    (problem,) = verify(store.folder)
    assert "is compressed" in problem


def test_a_file_is_not_read_past_its_recorded_size(store: EmbeddingStore) -> None:
    path = store.path(17)
    recorded = path.stat().st_size
    os.truncate(path, 10**12)
    assert verify(store.folder) == [f"{path.name}: has {10**12} bytes, but metadata.json records {recorded}."]


def test_a_file_that_two_readers_would_read_differently_is_believed_by_neither(store: EmbeddingStore) -> None:
    """Two records change places in the zip directory: torch follows it, and so must the fast reader."""
    store.load(7, "pred_logits")  # The fast reader knows this kind of file now.
    keys = {"a": torch.zeros(5, 5), "b": torch.ones(5, 5)}
    torch.save(keys, path := store.folder / "crafted.pt")
    reader = TensorReader()
    assert reader.read(path, "a").sum() == 0
    data = path.read_bytes()
    start = data.index(b"PK\x01\x02")
    first, second = (data.index(f"/data/{number}".encode(), start) for number in (0, 1))
    swapped = bytearray(data)
    swapped[first + 6], swapped[second + 6] = data[second + 6], data[first + 6]
    path.write_bytes(swapped)
    for fast in (reader, TensorReader()):
        with contextlib.suppress(ValueError):
            assert torch.equal(fast.read(path, "a"), torch.load(path)["a"])


def test_boxes_reach_beyond_the_image_only_where_the_model_lets_them(store: EmbeddingStore) -> None:
    """The box heads of D-FINE and RF-DETR do not end in a sigmoid."""
    tensors = plain(store, 7)
    tensors["pred_boxes"][0, 0] = -0.01
    files.save_tensors(store.folder, 7, tensors)
    images = [without("checksum", image) for image in store.metadata["images"]]
    for family, found in (("detr", 1), ("rt_detr", 1), ("rf_detr", 0), ("d_fine", 0)):
        edit_metadata(store.folder, images=images, model={**store.metadata["model"], "family": family})
        problems = verify(store.folder)
        assert len(problems) == found, problems
        assert all("outside of [0, 1]" in problem for problem in problems)


def test_the_number_of_workers_is_checked(store: EmbeddingStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(store.folder), "--workers", "-1"]) == 1
    assert "--workers: '-1' is not a number of 1 or more" in capsys.readouterr().err
