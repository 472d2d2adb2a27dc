from __future__ import annotations

import contextlib
import copy
import io
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from store_factory import COCO_ANNOTATIONS, annotations_of

from detr_lightning.detections import METRICS, Detections, best_detections, coco_results, detect, evaluate, to_coco_ids

NO_OBJECT = 91


def ground_truth(content: dict[str, Any]) -> COCO:
    coco = COCO()
    coco.dataset = copy.deepcopy(content)
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def predictions(content: dict[str, Any], noise: float = 0.0) -> dict[int, Detections]:
    """What a model would have to say to be right about every object, moved a little by `noise`."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for image in content["images"]:
        objects = [a for a in content["annotations"] if a["image_id"] == image["id"] and not a.get("iscrowd")]
        logits = torch.zeros(100, NO_OBJECT + 1)
        logits[:, NO_OBJECT] = 20
        boxes = torch.rand(100, 4, generator=generator, dtype=torch.float64)
        for query, annotation in enumerate(objects):
            x, y, w, h = annotation["bbox"]
            center = [(x + w / 2) / image["width"], (y + h / 2) / image["height"]]
            boxes[query] = torch.tensor([*center, w / image["width"], h / image["height"]])
            logits[query, NO_OBJECT] = 0
            logits[query, annotation["category_id"]] = 10 + 5 * torch.rand((), generator=generator)
        boxes[:, 2:] *= 1 + noise * (torch.rand(100, 2, generator=generator) - 0.5)
        boxes[:, :2] += 0.1 * noise * boxes[:, 2:] * torch.randn(100, 2, generator=generator)
        found[image["id"]] = detect(logits, boxes, (image["height"], image["width"]))
    return found


def rows_of(found: dict[int, Detections]) -> list[dict[str, Any]]:
    return [row for image_id, detections in found.items() for row in coco_results(image_id, detections)]


def independent(content: dict[str, Any], rows: list[dict[str, Any]]) -> list[float]:
    """The twelve numbers by pycocotools' own way in."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = ground_truth(content)
        evaluation = COCOeval(coco, coco.loadRes(copy.deepcopy(rows)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats]


def test_the_label_is_the_logit_index_and_no_object_is_dropped() -> None:
    logits = torch.zeros(3, 92)
    logits[0, 1] = 5  # A person.
    logits[1, [17, NO_OBJECT]] = torch.tensor([3.0, 9.0])  # Rather nothing than a cat.
    logits[2, 90] = 4
    scores, labels, _ = detect(logits, torch.rand(3, 4), (480, 640))
    assert labels.tolist() == [1, 17, 90]
    torch.testing.assert_close(scores, logits.softmax(-1)[range(3), [1, 17, 90]])
    assert scores[1] < 0.01


def test_with_sigmoid_every_logit_is_a_category() -> None:
    logits = torch.tensor([[-2.0, 1.0, 3.0], [0.5, -1.0, -3.0]])
    scores, labels, _ = detect(logits, torch.rand(2, 4), (10, 10), scoring="sigmoid")
    assert labels.tolist() == [2, 0]
    torch.testing.assert_close(scores, logits.sigmoid()[range(2), [2, 0]])
    assert detect(logits, torch.rand(2, 4), (10, 10)).labels.tolist() == [1, 0]
    with pytest.raises(ValueError, match="scoring is 'logistic', which is not one of softmax, sigmoid"):
        detect(logits, torch.rand(2, 4), (10, 10), scoring="logistic")


@pytest.mark.parametrize("kind", ["RTDetr", "RfDetr", "ConditionalDetr"])
def test_the_best_detections_are_those_of_transformers(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    generator = torch.Generator().manual_seed(0)
    logits, boxes = torch.randn(1, 20, 5, generator=generator), torch.rand(1, 20, 4, generator=generator)
    outputs = SimpleNamespace(logits=logits, pred_boxes=boxes)
    sizes = torch.tensor([[300, 500]])
    process = getattr(transformers, f"{kind}ImageProcessor")().post_process_object_detection
    expected = process(outputs, 0.0, sizes, **({"top_k": 20} if kind == "ConditionalDetr" else {}))[0]
    found = best_detections(logits[0], boxes[0], (300, 500), "sigmoid")
    torch.testing.assert_close(found.scores, expected["scores"])
    assert found.labels.tolist() == expected["labels"].tolist()
    torch.testing.assert_close(found.boxes_xyxy, expected["boxes"])
    assert len(set(found.boxes_xyxy[:, 0].tolist())) < 20
    for ours, plain in zip(
        best_detections(logits[0], boxes[0], (9, 9)), detect(logits[0], boxes[0], (9, 9)), strict=True
    ):
        assert torch.equal(ours, plain)


def test_labels_become_coco_ids() -> None:
    found = detect(torch.eye(3), torch.rand(3, 4), (10, 10), "sigmoid")
    assert to_coco_ids(found, [5, None, 90]).labels.tolist() == [5, 1, 90]
    assert to_coco_ids(found, None).labels.tolist() == [0, 1, 2]


def test_boxes_are_in_pixels_of_the_original_and_not_clamped() -> None:
    boxes = torch.tensor([[0.5, 0.5, 0.5, 0.25], [0.0, 1.0, 0.2, 0.2]])
    found = detect(torch.zeros(2, 92), boxes, (480, 640))
    torch.testing.assert_close(found.boxes_xyxy, torch.tensor([[160.0, 180, 480, 300], [-64, 432, 64, 528]]))
    row = coco_results(139, found)[0]
    assert row["bbox"] == pytest.approx([160, 180, 320, 120])
    assert row["image_id"] == 139
    assert row["category_id"] == 0
    assert [type(value) for value in (row["score"], *row["bbox"])] == [float] * 5


def test_a_batch_equals_its_images() -> None:
    logits, boxes = torch.randn(3, 10, 92), torch.rand(3, 10, 4)
    sizes = torch.tensor([(480, 640), (640, 480), (100, 200)])
    batch = detect(logits, boxes, sizes)
    for index in range(3):
        alone = detect(logits[index], boxes[index], tuple(sizes[index].tolist()))
        for whole, part in zip(batch, alone, strict=True):
            assert torch.equal(whole[index], part)


def test_half_precision_is_widened() -> None:
    found = detect(torch.randn(4, 92).bfloat16(), torch.rand(4, 4).half(), (480, 640))
    assert {tensor.dtype for tensor in (found.scores, found.boxes_xyxy)} == {torch.float32}


def test_the_threshold_leaves_out_lower_scores() -> None:
    found = Detections(torch.tensor([0.2, 0.9]), torch.tensor([1, 3]), torch.zeros(2, 4))
    assert [row["category_id"] for row in coco_results(1, found, 0.5)] == [3]
    assert len(coco_results(1, found)) == 2


def test_the_oracle_scores_one() -> None:
    content = annotations_of(6, 6)
    numbers = evaluate(ground_truth(content), rows_of(predictions(content)))
    assert tuple(numbers) == METRICS
    for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100"):
        assert numbers[name] == pytest.approx(1.0), name


def test_shifted_labels_score_nothing() -> None:
    content = annotations_of()
    rows = [row | {"category_id": row["category_id"] - 1} for row in rows_of(predictions(content))]
    assert evaluate(ground_truth(content), rows)["AP"] < 0.01


@pytest.mark.skipif(not COCO_ANNOTATIONS.is_file(), reason="the sample of COCO's val2017 is not beside the repository")
def test_the_oracle_scores_one_on_coco() -> None:
    content = json.loads(COCO_ANNOTATIONS.read_text())
    numbers = evaluate(ground_truth(content), rows_of(predictions(content)))
    assert numbers["AP"] == pytest.approx(1.0)
    assert numbers["AR100"] == pytest.approx(1.0)
    rows = rows_of(predictions(content, noise=0.8))
    assert list(evaluate(ground_truth(content), rows).values()) == independent(content, rows)


def test_the_numbers_are_cocoevals() -> None:
    content = annotations_of(8, 7)
    content["annotations"][3]["iscrowd"] = 1
    content["annotations"][3]["segmentation"] = {"size": [480, 640], "counts": [0, 307200]}
    rows = rows_of(predictions(content, noise=0.8))
    kept = copy.deepcopy(rows)
    numbers = evaluate(ground_truth(content), rows)
    assert list(numbers.values()) == independent(content, rows)
    assert 0.2 < numbers["AP"] < 0.9
    assert rows == kept


def test_the_numbers_are_torchmetrics() -> None:
    from torchmetrics.detection import MeanAveragePrecision

    content = annotations_of(8, 7)
    found = predictions(content, noise=0.8)
    metric = MeanAveragePrecision(box_format="xyxy")
    for image in content["images"]:
        scores, labels, boxes = found[image["id"]]
        objects = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        target = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in objects)])
        classes = torch.tensor([a["category_id"] for a in objects])
        metric.update(
            [{"scores": scores, "labels": labels, "boxes": boxes.float()}], [{"labels": classes, "boxes": target}]
        )
    theirs = metric.compute()
    ours = evaluate(ground_truth(content), rows_of(found))
    for name, other in {"AP": "map", "AP50": "map_50", "AP75": "map_75", "AR100": "mar_100"}.items():
        assert ours[name] == pytest.approx(theirs[other].item(), abs=1e-5)


def test_no_detections_and_no_objects_are_numbers_too(capsys: pytest.CaptureFixture[str]) -> None:
    content = annotations_of()
    nothing = evaluate(ground_truth(content), [])
    assert nothing["AP"] == nothing["AR100"] == 0
    empty = evaluate(ground_truth(content | {"annotations": []}), rows_of(predictions(content)))
    assert set(empty.values()) == {-1.0}
    assert capsys.readouterr().out == ""


def test_a_subset_of_the_images() -> None:
    content = annotations_of()
    first = content["images"][0]["id"]
    rows = coco_results(first, predictions(content)[first])
    assert evaluate(ground_truth(content), rows)["AR100"] < 0.5
    assert evaluate(ground_truth(content), rows, image_ids=[first])["AP"] == pytest.approx(1.0)


def test_an_annotation_file_of_hand_without_info() -> None:
    content = annotations_of()
    del content["info"]
    assert evaluate(ground_truth(content), rows_of(predictions(content)))["AP"] == pytest.approx(1.0)


def test_detections_of_other_images_are_refused() -> None:
    content = annotations_of()
    rows = [{"image_id": 5, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 0.5}]
    with pytest.raises(ValueError, match="image 5 has detections but is not in the annotations"):
        evaluate(ground_truth(content), rows)


def test_a_score_at_the_threshold_counts() -> None:
    """Scores are float32: what the writer keeps at a min_score is there at the same threshold."""
    logits = torch.tensor([[0.7, 0.1]]).logit()
    score = float(logits.sigmoid().max())
    assert score < 0.7
    found = detect(logits, torch.rand(1, 4), (10, 10), "sigmoid")
    assert bool(found.scores[0] >= 0.7)
    assert [row["score"] for row in coco_results(1, found, 0.7)] == [score]
