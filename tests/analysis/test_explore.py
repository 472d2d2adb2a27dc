"""Exploring in a browser. What needs Embedding Atlas runs where it is installed; the rest runs everywhere."""

from __future__ import annotations

import io
import json
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet
from store_factory import annotations_of, edit_metadata, make_store

from detr_lightning.analysis import explore
from detr_lightning.analysis.objects import objects, write_objects
from detr_lightning.analysis.pictures import square_around
from detr_lightning.command.main import main
from detr_lightning.store import EmbeddingStore

Capture = pytest.CaptureFixture[str]

has_atlas = explore.importlib.util.find_spec("embedding_atlas") is not None
needs_atlas = pytest.mark.skipif(not has_atlas, reason="Embedding Atlas is not installed")
pytestmark = pytest.mark.filterwarnings("default" if has_atlas else "error")  # Its dependencies warn.


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    """Three objects in one image, whose left half is red and whose right half is blue."""
    content = annotations_of(1)
    picture = Image.new("RGB", (640, 480), "blue")
    picture.paste("red", (0, 0, 320, 480))
    (tmp_path / "images").mkdir()
    picture.save(tmp_path / "images" / content["images"][0]["file_name"])
    return make_store(tmp_path / "store", content, image_dir=tmp_path / "images")


@pytest.fixture
def table(store: EmbeddingStore, tmp_path: Path) -> Path:
    return write_objects(store, tmp_path / "objects.parquet")


def test_the_square_around_a_box_is_moved_into_the_image() -> None:
    picture = Image.new("RGB", (100, 60), "red")
    assert square_around(picture, 0, 0, 10, 20).size == (24, 24)
    assert np.asarray(square_around(picture, 90, 50, 100, 60)).reshape(-1, 3).min(0).tolist() == [255, 0, 0]
    tall = np.asarray(square_around(picture, 10, 0, 20, 60))  # The square of 72 does not fit into 60 rows.
    assert tall.shape == (72, 72, 3)
    assert tall[0, 0].tolist() == [232, 232, 232]
    assert tall[36, 36].tolist() == [255, 0, 0]


def test_the_table_has_thumbnails_and_is_made_once(store: EmbeddingStore, table: Path, tmp_path: Path) -> None:
    output = tmp_path / "explore.parquet"
    assert explore.prepare(store, table, output)
    read = parquet.read_table(output).to_pandas()
    assert list(read)[:4] == ["crop", "category", "score", "area_class"]  # What is seen without scrolling.
    assert "embedding" not in read
    expected = objects(store)
    assert read.score.tolist() == expected.score.tolist()
    for row in read.itertuples():
        with Image.open(io.BytesIO(row.crop["bytes"])) as crop:
            assert crop.size == (explore.SIDE, explore.SIDE)
            red, _, blue = np.asarray(crop.convert("RGB")).reshape(-1, 3).mean(0)
        assert (red > blue) == ((row.x1 + row.x2) / 2 < 320)
    made = output.stat().st_mtime_ns
    assert explore.prepare(store, table, output)
    assert output.stat().st_mtime_ns == made
    write_objects(store, table, 0.98)  # Fewer objects.
    explore.prepare(store, table, output)
    assert output.stat().st_mtime_ns != made


def test_images_that_have_moved(store: EmbeddingStore, table: Path, tmp_path: Path) -> None:
    (tmp_path / "images").rename(tmp_path / "moved")
    output = tmp_path / "explore.parquet"
    assert not explore.prepare(store, table, output)
    assert "crop" not in parquet.read_schema(output).names
    assert explore.prepare(store, table, output, tmp_path / "moved")
    assert "crop" in parquet.read_schema(output).names
    with pytest.raises(FileNotFoundError, match="Give image_dir"):
        explore.prepare(store, table, output, tmp_path)


def test_nothing_to_explore(store: EmbeddingStore, table: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="No query"):
        write_objects(store, table, 1.0)
    with pytest.raises(ValueError, match="no objects to explore"):
        explore.prepare(store, table, tmp_path / "explore.parquet")


def test_a_missing_package_says_what_to_install(
    store: EmbeddingStore, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "embedding_atlas", None)
    monkeypatch.setattr(explore.importlib.util, "find_spec", lambda name: None)
    assert main(["explore", str(store.folder)]) == 1
    assert "pip install 'detr-lightning[explore]'" in capsys.readouterr().err


def test_what_is_refused_before_anything_is_made(
    store: EmbeddingStore, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explore, "require_atlas", lambda: None)
    assert main(["explore", str(store.folder), "--image_dir", str(tmp_path / "none")]) == 1
    assert "which is not a folder" in capsys.readouterr().err
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["explore", str(store.folder), "--port", str(port)]) == 1
        assert f"port {port} is in use" in capsys.readouterr().err
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "mine.txt").write_text("mine")
    assert main(["explore", str(store.folder), "--export", str(tmp_path / "page")]) == 1
    assert "is not empty" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.parquet"))


def test_a_lance_table_has_thumbnails_too(
    store: EmbeddingStore, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lance")  # Three objects have no map, which would need Embedding Atlas.
    assert main(["convert", str(store.folder), str(tmp_path / "table")]) == 0
    exported: list[Path] = []
    monkeypatch.setattr(explore, "require_atlas", lambda: None)
    monkeypatch.setattr(explore, "export", lambda prepared, pictures, folder: exported.append(prepared))
    assert main(["explore", str(tmp_path / "table"), "--export", str(tmp_path / "page")]) == 0
    assert "No thumbnails" not in capsys.readouterr().out
    assert exported == [tmp_path / "table.objects.explore.parquet"]
    explore.prepare(store, write_objects(store, tmp_path / "objects.parquet"), tmp_path / "of_files.parquet")
    assert parquet.read_table(exported[0]).equals(parquet.read_table(tmp_path / "of_files.parquet"))


@needs_atlas
def test_a_page_is_exported(tmp_path: Path, capsys: Capture) -> None:
    store = make_store(tmp_path / "store", annotations_of(20))
    edit_metadata(store.folder, config=None)
    page = tmp_path / "page"
    assert main(["explore", str(store.folder), "--export", str(page)]) == 0
    assert "No thumbnails" in capsys.readouterr().out
    assert (page / "index.html").is_file()
    assert json.loads((page / "data" / "metadata.json").read_text())["isStatic"]
    read = parquet.read_table(page / "data" / "dataset.parquet").to_pandas()
    assert len(read) == 60
    assert read.projection_x.std() > 0
    near = read.neighbors[0]["ids"]
    vectors = np.stack(objects(store).embedding)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    exact = np.argsort(-vectors @ vectors[0])[:15]
    assert len({*near} & {*exact}) > 12
    shutil.rmtree(page)
