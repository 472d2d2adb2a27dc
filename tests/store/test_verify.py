from __future__ import annotations

import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from store_factory import annotations_of, edit_metadata, make_store

from detr_lightning.format import files, names
from detr_lightning.format.keys import EXTRACT_TYPES, KEYS
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
    size = files.save_tensors(store.folder, image_id, tensors)
    images = store.metadata["images"]
    edit_metadata(store.folder, images=[i | {"bytes": size} if i["id"] == image_id else i for i in images])


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
        assert problems[0].startswith("embedding_000000000017.pt: damaged, the checksum of archive/data/")


def test_damaged_foreign_and_missing_files(store: EmbeddingStore) -> None:
    whole = store.path(7).read_bytes()
    store.path(7).write_bytes(whole[:-100])
    store.path(17).unlink()
    torch.save([1], store.path(27))
    store.path(37).write_bytes(b"")
    problems = "\n".join(verify(store.folder))
    assert "007.pt: has" in problems
    assert "007.pt: damaged, does not load" in problems
    assert "017.pt: missing." in problems
    assert "027.pt: not a dict of tensors." in problems
    assert "037.pt: damaged, does not load" in problems


def test_files_that_do_not_belong(store: EmbeddingStore) -> None:
    (store.folder / "embedding_000000000099.pt").touch()
    (store.folder / ".embedding_7.abc.tmp").touch()
    (store.folder / "notes.txt").touch()
    assert verify(store.folder) == [
        ".embedding_7.abc.tmp: a temporary file that a killed run left. It can be deleted.",
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
            r"encoder_output has the shape \[79, 16\], expected",
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
        ({"num_images": 5}, "num_images is 5, image_ids lists 4"),
        ({"extract_type": "some"}, "extract_type is 'some'"),
        ({"failed": [{"id": 17, "file_name": "17.jpg", "reason": "?"}]}, "image 17 is both extracted and failed"),
        ({"versions": None}, "versions is missing"),
        ({"model": {"architecture": {"block": "basic"}}}, "model.weights is missing"),
        ({"model": {"weights": "", "sha256": "", "architecture": {}}}, "model.architecture is incomplete"),
        ({"model": 3}, "model is 3, not of type dict"),
        ({"failed": [17]}, "failed: an image's entry is 17, no object"),
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
    assert "4 images, every file whole and right." in capsys.readouterr().out
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


def test_the_summary(store: EmbeddingStore, capsys: pytest.CaptureFixture[str]) -> None:
    edit_metadata(store.folder, failed=[{"id": 99, "file_name": "b[a]d.jpg", "reason": "truncated"}])
    assert main(["summary", str(store.folder)]) == 0
    text = capsys.readouterr().out
    for part in ("images", "decoder_output", "[3, 10, 16]", "[80, 16]", "random", "32-true", "b[a]d.jpg: truncated"):
        assert part in text
