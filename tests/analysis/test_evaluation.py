"""COCO's numbers from a store."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from store_factory import annotations_of, make_store, plain

from detr_lightning import EmbeddingStore
from detr_lightning.analysis.evaluation import evaluate_store
from detr_lightning.command.main import main

CONTENT = annotations_of(6, 5)


def write(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(json.dumps(content))
    return path


def independent(store: EmbeddingStore, annotations: Path) -> list[float]:
    """COCOeval's twelve numbers of the files, scored as the official PostProcess does: no detr_lightning."""
    rows = []
    sizes = {image["id"]: (image["width"], image["height"]) for image in CONTENT["images"]}
    for image_id in store.image_ids:
        tensors = plain(store, image_id)
        scores, labels = tensors["pred_logits"].softmax(-1)[:, :-1].max(-1)
        width, height = sizes[image_id]
        x, y, w, h = (tensors["pred_boxes"] * torch.tensor([width, height, width, height])).unbind(-1)
        for box, score, label in zip(torch.stack([x - w / 2, y - h / 2, w, h], -1), scores, labels, strict=True):
            row = {"bbox": box.tolist(), "score": score.item(), "category_id": label.item()}
            rows.append({"image_id": image_id, **row})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        evaluation = COCOeval(truth, truth.loadRes(rows), "bbox")
        evaluation.params.imgIds = store.image_ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats]


def test_the_numbers_are_those_of_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved = [a | {"bbox": [a["bbox"][0] + 4 * (a["id"] % 3), *a["bbox"][1:]]} for a in CONTENT["annotations"]]
    annotations = write(tmp_path / "instances.json", CONTENT | {"annotations": moved})
    store = make_store(tmp_path / "store", CONTENT)
    numbers = evaluate_store(store, annotations)
    assert list(numbers.values()) == pytest.approx(independent(store, annotations), abs=1e-5)
    assert 0.3 < numbers["AP"] < 0.99
    output = tmp_path / "metrics.json"
    assert main(["evaluate", str(store.folder), "--annotations", str(annotations), "--output", str(output)]) == 0
    assert json.loads(output.read_text())["AP"] == pytest.approx(numbers["AP"])
    assert "AP" in capsys.readouterr().out


def test_only_the_images_of_the_store_count(tmp_path: Path) -> None:
    half = CONTENT | {"images": CONTENT["images"][:3]}
    store = make_store(tmp_path / "store", half | {"annotations": CONTENT["annotations"][:15]})
    assert evaluate_store(store, write(tmp_path / "instances.json", CONTENT))["AR100"] == pytest.approx(1)


def test_what_cannot_be_evaluated(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", CONTENT)
    others = [image | {"id": image["id"] + 1} for image in CONTENT["images"]]
    with pytest.raises(ValueError, match=r"other\.json"):
        evaluate_store(store, write(tmp_path / "other.json", CONTENT | {"images": others, "annotations": []}))
    with pytest.raises(FileNotFoundError, match=r"gone\.json"):
        evaluate_store(store, tmp_path / "gone.json")
    without = make_store(tmp_path / "without", CONTENT, keys=["query_embeddings"])
    with pytest.raises(ValueError, match="pred_logits"):
        evaluate_store(without, write(tmp_path / "instances.json", CONTENT))
