from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet
from pycocotools.coco import COCO
from safetensors import safe_open
from safetensors.torch import load_file
from store_factory import annotations_of, make_store

from detr_lightning.detections import evaluate
from detr_lightning.store import EmbeddingStore
from detr_lightning.store.__main__ import main
from detr_lightning.store.export import export


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detr_lightning.store.export._BLOCK", 3)  # Four images make two blocks.


@pytest.mark.parametrize(
    ("key", "pool"), [("query_embeddings", None), ("decoder_output", None), ("encoder_output", "mean")]
)
def test_numpy(store: EmbeddingStore, tmp_path: Path, key: str, pool: str | None) -> None:
    written = export(store, tmp_path / "vectors.npy", "npy", key, pool=pool)
    assert written == [tmp_path / "vectors.npy", tmp_path / "vectors.ids.npy"]
    ids, stacked = store.stack(key, pool=pool)
    assert np.load(written[1]).tolist() == ids
    assert np.array_equal(np.load(written[0], mmap_mode="r"), stacked.numpy())


def test_numpy_float16(tmp_path: Path) -> None:
    store = make_store(tmp_path / "half", dtype="float16")
    vectors = np.load(export(store, tmp_path / "vectors.npy", image_ids=[27, 7])[0])
    assert vectors.dtype == np.float16
    assert np.array_equal(vectors[0], store[27]["query_embeddings"].numpy())


def test_parquet(store: EmbeddingStore, tmp_path: Path) -> None:
    (path,) = export(store, tmp_path / "vectors.parquet", "parquet", "decoder_output")
    table = parquet.read_table(path)
    ids, stacked = store.stack("decoder_output")
    assert table["image_id"].to_pylist() == ids
    shape = json.loads(table.schema.metadata[b"shape"])
    assert shape == [3, 10, 16]
    frame = table.to_pandas()  # pandas sees the columns, not the schema's metadata.
    vectors = np.stack([row.embedding.reshape(row.shape) for row in frame.itertuples()])
    assert np.array_equal(vectors, stacked.numpy())


def test_safetensors(store: EmbeddingStore, tmp_path: Path) -> None:
    (path,) = export(store, tmp_path / "vectors.safetensors", "safetensors")
    tensors = load_file(path)
    ids, stacked = store.stack("query_embeddings")
    assert tensors["image_ids"].tolist() == ids
    assert torch.equal(tensors["query_embeddings"], stacked)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["source"] == str(store.folder)
    assert json.loads(metadata["model"]) == {"weights": "random", "sha256": "0" * 64}
    assert json.loads(metadata["shape"]) == [10, 16]
    assert metadata["image_ids"] == "the image id of each row"


def test_coco_results_are_what_pycocotools_reads(store: EmbeddingStore, tmp_path: Path) -> None:
    annotations = tmp_path / "instances.json"
    annotations.write_text(json.dumps(annotations_of()))
    (path,) = export(store, tmp_path / "results.json", "coco")
    rows = json.loads(path.read_text())
    assert len(rows) == 4 * 10
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = COCO(str(annotations))
        assert len(ground_truth.loadRes(str(path)).getAnnIds()) == len(rows)
    assert evaluate(ground_truth, rows)["AP"] == pytest.approx(1.0)
    (path,) = export(store, tmp_path / "results.json", "coco", threshold=0.7, image_ids=[7])
    assert len(json.loads(path.read_text())) == 3


def test_an_export_that_fails_leaves_what_was_there(store: EmbeddingStore, tmp_path: Path) -> None:
    for format, name, options in [
        ("npy", "a.npy", {"key": "backbone_features"}),
        ("parquet", "a.parquet", {"key": "backbone_features"}),
        ("safetensors", "a.safetensors", {"key": "backbone_features"}),
        ("coco", "a.json", {"threshold": 1.0}),
    ]:
        (tmp_path / name).write_text("before")
        with pytest.raises(ValueError, match=r"cannot be stacked|No query of 4 images"):
            export(store, tmp_path / name, format, **options)
        assert (tmp_path / name).read_text() == "before"
    store.path(37).unlink()  # In the second block.
    for name in ("b.npy", "b.parquet"):
        with pytest.raises(FileNotFoundError, match="was removed"):
            export(store, tmp_path / name, name[2:])
    assert not list(tmp_path.glob("b.*"))
    assert not list(tmp_path.glob(".*"))


def test_parquet_cannot_store_empty_vectors(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", num_queries=0, content=annotations_of(objects=0))
    assert np.load(export(store, tmp_path / "a.npy")[0]).shape == (4, 0, 16)
    with pytest.raises(ValueError, match=r"query_embeddings has shape \[0, 16\].* export to npy"):
        export(store, tmp_path / "a.parquet", "parquet")
    assert not (tmp_path / "a.parquet").exists()


def test_where_an_export_may_go(store: EmbeddingStore, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format is 'csv'"):
        export(store, tmp_path / "a.csv", "csv")
    with pytest.raises(ValueError, match=r"does not end in \.npy"):
        export(store, tmp_path / "a.json", "npy")
    assert export(store, tmp_path / "new" / "folder" / "a.npy")[0].is_file()
    (tmp_path / "a.ids.npy").write_text("before")
    with pytest.raises(FileExistsError, match=r"a\.ids\.npy already exists"):
        export(store, tmp_path / "a.npy", overwrite=False)
    export(store, tmp_path / "b.npy", overwrite=False)
    with pytest.raises(ValueError, match="the extraction's own folder"):
        export(store, store.folder / "a.npy")
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        export(store, tmp_path / "folder.npy")
    with pytest.raises(ValueError, match=r"^\. is a folder"):
        export(store, ".")
    with pytest.raises(ValueError, match="No image of"):
        export(store, tmp_path / "a.npy", image_ids=[])


def test_the_command(store: EmbeddingStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "pooled.npy"
    options = ["--format", "npy", "--key", "backbone_features", "--pool", "mean", "--output", str(output)]
    assert main(["export", str(store.folder), *options]) == 0
    assert capsys.readouterr().out == f"wrote {output}\nwrote {tmp_path / 'pooled.ids.npy'}\n"
    assert np.load(output).shape == (4, 512)
    assert main(["export", str(store.folder), *options]) == 1
    assert "pooled.npy already exists" in capsys.readouterr().err
    assert main(["export", str(store.folder), *options, "--overwrite"]) == 0
    assert main(["export", str(store.folder), "--key", "query_embedings", "--output", str(tmp_path / "b.npy")]) == 1
    assert "Did you mean 'query_embeddings'?" in capsys.readouterr().err
    assert main(["export", str(store.folder), "--key", "nothing", "--output", str(tmp_path / "b.npy")]) == 1
    assert "has no 'nothing'" in capsys.readouterr().err
    assert main(["export", str(tmp_path), "--output", str(tmp_path / "b.npy")]) == 1
    assert "metadata.json" in capsys.readouterr().err
