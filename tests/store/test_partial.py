"""Reading a folder whose extraction has not finished."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from coco_factory import Coco
from ran import RunCLI

from detr_lightning import EmbeddingStore
from detr_lightning.analysis.objects import objects, write_objects
from detr_lightning.extractor import DETRExtractor

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"


@pytest.fixture
def folder(run_cli: RunCLI, coco_folder: Coco, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run over eight images that ended in the middle."""
    step, seen = DETRExtractor.predict_step, []

    def crash(self: DETRExtractor, batch: dict, *args: int) -> dict:
        if len(seen) == 4:
            raise RuntimeError("the power is out")
        seen.extend(batch["image_id"])
        return step(self, batch, *args)

    monkeypatch.setattr(DETRExtractor, "predict_step", crash)
    with pytest.raises(RuntimeError, match="the power is out"):
        run_cli("predict", *coco_folder.data, "--output_dir", tmp_path / "out", "--data.batch_size", "1")
    monkeypatch.setattr(DETRExtractor, "predict_step", step)
    return tmp_path / "out"


def test_a_partial_store_has_what_is_finished(run_cli: RunCLI, coco_folder: Coco, folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"unfinished.*partial=True"):
        EmbeddingStore(folder)
    store = EmbeddingStore(folder, partial=True)
    files = sorted(folder.glob("*.pt"))
    assert 0 < len(files) < 8
    assert [store.path(image_id) for image_id in store] == files
    assert (store.is_partial, store.num_planned) == (True, 8)
    assert f"{len(files)} of 8 images, unfinished" in repr(store)
    ids, vectors = store.stack("query_embeddings")
    assert torch.equal(vectors[0], torch.load(files[0])["query_embeddings"])
    assert store.categories
    assert store.image_path(ids[0]).is_file()
    path = write_objects(store, folder.parent / "objects.parquet", 0.0)
    assert pd.read_parquet(path).score.tolist() == objects(store, 0.0).score.tolist()

    said = run_cli("summary", folder)
    assert said.code == 0, said.err
    assert f"{len(files)} of 8 images, unfinished" in said.out

    files[0].write_bytes(files[0].read_bytes()[:-1])  # Recorded, and torn by a crash of the machine.
    assert EmbeddingStore(folder, partial=True).image_ids == ids[1:]

    assert run_cli("predict", *coco_folder.data, "--output_dir", folder, "--data.batch_size", "1").code == 0
    finished = EmbeddingStore(folder, partial=True)
    assert (finished.is_partial, finished.num_planned, len(finished)) == (False, 8, 8)


def test_the_number_is_that_of_the_last_run(
    run_cli: RunCLI, coco_folder: Coco, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = EmbeddingStore(folder, partial=True).image_ids
    others = [entry["id"] for entry in json.loads(coco_folder.annotations.read_text())["images"]]
    more = next(image_id for image_id in others if image_id not in finished)

    def crash(self: DETRExtractor, *args: object) -> dict:
        raise RuntimeError("again")

    monkeypatch.setattr(DETRExtractor, "predict_step", crash)
    with pytest.raises(RuntimeError, match="again"):
        run_cli("predict", *coco_folder.data, "--output_dir", folder, "--data.image_ids", f"[{more}]")
    store = EmbeddingStore(folder, partial=True)
    assert (store.image_ids, store.num_planned) == (finished, len(finished) + 1)


def test_a_folder_of_an_earlier_release_and_folders_without_a_run(run_cli: RunCLI, tmp_path: Path) -> None:
    store = EmbeddingStore(FIXTURES / "unfinished_0_1_0", partial=True)
    assert (store.image_ids, store.num_planned) == ([1, 3], 3)
    assert run_cli("summary", FIXTURES / "unfinished_0_1_0").code == 0
    (tmp_path / "file").touch()
    for path, reason in ((tmp_path, "has no metadata.json"), (tmp_path / "file", "is a file")):
        with pytest.raises(FileNotFoundError, match=reason):
            EmbeddingStore(path, partial=True)


def test_a_run_that_was_emptying_its_folder_leaves_nothing_to_read(folder: Path) -> None:
    state = folder / ".extraction" / "run.json"
    content = json.loads(state.read_text())
    state.write_text(json.dumps({"void": True, "token": content["token"], "planned": content["planned"]}))
    with pytest.raises(FileNotFoundError, match="overwrite"):
        EmbeddingStore(folder, partial=True)
