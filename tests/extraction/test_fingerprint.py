"""`data.fingerprint: content`: a changed image file is noticed at a resume, in both layouts."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from coco_factory import Coco, make_coco
from PIL import Image
from ran import RunCLI

from detr_lightning import EmbeddingStore, extract

CONTENT = ("--data.fingerprint", "content")
LAYOUTS = [
    "files",
    pytest.param("lance", marks=pytest.mark.skipif(find_spec("lance") is None, reason="pylance is not installed")),
]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def change(path: Path) -> None:
    """Save other pixels under the same name and size."""
    with Image.open(path) as image:
        size = image.size
    Image.new("RGB", size, "red").save(path)


def recorded(folder: Path) -> dict[str, str | None]:
    store = EmbeddingStore(folder)
    return {store.entry(image_id).file_name: store.entry(image_id).image_sha256 for image_id in store}


@pytest.fixture
def coco(tmp_path: Path) -> Coco:
    return make_coco(tmp_path / "coco", 3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_changed_file_is_refused_by_name(layout: str, coco: Coco, run_cli: RunCLI, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("predict", *coco.data, "--output_dir", out, "--writer.layout", layout)
    paths = sorted(coco.images.iterdir())
    expected = {path.name: sha256(path) for path in paths}
    ran = run_cli(*command, *CONTENT, "--data.limit", "2")
    assert ran.code == 0, ran.err
    assert recorded(out) == {path.name: expected[path.name] for path in paths[:2]}
    ran = run_cli(*command, *CONTENT)
    assert (ran.code, "1 image to" in ran.err) == (0, True), ran.err
    assert recorded(out) == expected
    assert "Nothing to do" in run_cli(*command, *CONTENT).err

    change(paths[1])
    for extra in ((), ("--dry_run",)):
        ran = run_cli(*command, *CONTENT, *extra)
        assert ran.code == 1
        assert "1 image whose file has changed" in ran.err
        assert f"'{paths[1].name}'. Restore" in ran.err
    assert "Nothing to do" in run_cli(*command).err  # Names and sizes are those that were recorded.
    assert recorded(out) == expected
    paths[1].unlink()
    ran = run_cli(*command, *CONTENT)
    assert ran.code == 1
    assert paths[1].name in ran.err
    assert "data.fingerprint=names" in ran.err


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_image_that_was_not_hashed_is_hashed_and_not_redone(
    layout: str, coco: Coco, run_cli: RunCLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    command = ("predict", *coco.data, "--output_dir", out, "--writer.layout", layout)
    assert run_cli(*command).code == 0
    assert set(recorded(out).values()) == {None}
    before = {image_id: tensors["query_embeddings"] for image_id, tensors in EmbeddingStore(out).items()}
    files = {path: path.stat().st_mtime_ns for path in out.glob("*.pt")}

    def predict_step(_self: Any, batch: dict[str, Any], *_: int) -> dict[str, Any]:
        assert batch["image_id"] == []
        return {"image_id": [], "feature_size": []}

    monkeypatch.setattr("detr_lightning.extractor.DETRExtractor.predict_step", predict_step)
    ran = run_cli(*command, *CONTENT)
    assert ran.code == 0, ran.err
    assert "3 more are finished" in ran.err
    assert recorded(out) == {path.name: sha256(path) for path in coco.images.iterdir()}
    assert {path: path.stat().st_mtime_ns for path in files} == files
    store = EmbeddingStore(out)
    assert list(store) == list(before)
    for image_id, embeddings in before.items():
        assert store[image_id]["query_embeddings"].equal(embeddings)
    assert run_cli("verify", out).code == 0
    assert "Nothing to do" in run_cli(*command, *CONTENT).err


@pytest.mark.parametrize("backend", ["pil", "torchvision"])
def test_the_hash_changes_no_number(backend: str, coco: Coco, tiny_weights: Path) -> None:
    paths = sorted(coco.images.iterdir())
    with Image.open(paths[0]) as image:
        settings = {"weights": tiny_weights, "keys": ["query_embeddings"], "progress": False, "image_backend": backend}
        plain, hashed = (
            extract([*paths, image], fingerprint=fingerprint, short_side=64, long_side=128, **settings)
            for fingerprint in ("names", "content")
        )
    assert [hashed.entry(i).image_sha256 for i in hashed] == [*map(sha256, paths), None]  # One is in memory alone.
    for image_id in plain:
        assert hashed[image_id]["query_embeddings"].equal(plain[image_id]["query_embeddings"])
