import hashlib
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from places import ROOT
from pycocotools.coco import COCO

from detr_lightning.demo import pictures as demo_dataset

DEMO = ROOT / "assets" / "demo"
sys.path.insert(0, str(ROOT))

from tools import train_demo  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shapes")
    demo_dataset.write_dataset(path, images=24, seed=2)
    return path


def test_the_seed_and_the_number_decide_a_picture():
    assert demo_dataset.draw_picture(5, 3) == demo_dataset.draw_picture(5, 3)
    assert demo_dataset.draw_picture(5, 3).jpeg != demo_dataset.draw_picture(5, 7).jpeg
    assert demo_dataset.draw_picture(5, 3).jpeg != demo_dataset.draw_picture(6, 3).jpeg


def test_a_longer_dataset_begins_with_the_shorter_one(folder, tmp_path):
    demo_dataset.write_dataset(tmp_path, images=3, seed=2)
    for file in (tmp_path / "images").iterdir():
        assert file.read_bytes() == (folder / "images" / file.name).read_bytes()


def test_every_category_and_kind_of_picture_occurs(folder):
    content = json.loads((folder / demo_dataset.ANNOTATION_FILE).read_text())
    annotations = content["annotations"]
    assert {row["category_id"] for row in annotations if not row["iscrowd"]} == set(demo_dataset.CATEGORIES)
    assert any(row["iscrowd"] for row in annotations)
    assert {row["id"] for row in content["images"]} - {row["image_id"] for row in annotations}  # some are empty
    assert {(row["width"] > row["height"]) - (row["width"] < row["height"]) for row in content["images"]} == {-1, 0, 1}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' own
def test_boxes_areas_and_masks_agree(folder):
    coco = COCO(str(folder / demo_dataset.ANNOTATION_FILE))
    for row in coco.anns.values():
        image = coco.imgs[row["image_id"]]
        left, top, width, height = row["bbox"]
        assert left >= 0
        assert top >= 0
        assert left + width <= image["width"]
        assert top + height <= image["height"]
        mask = coco.annToMask(row)
        assert mask.shape == (image["height"], image["width"])
        assert mask.sum() == pytest.approx(row["area"], rel=0.12)
        y, x = np.nonzero(mask)
        found = [x.min(), y.min(), x.max() + 1, y.max() + 1]
        assert np.abs(np.array(found) - [left, top, left + width, top + height]).max() < 2
        assert isinstance(row["segmentation"], dict) == bool(row["iscrowd"])


@pytest.mark.parametrize("source", [DEMO, None], ids=["committed", "drawn now"])
def test_files_are_jpegs_of_the_recorded_size(source, folder):
    source = source or folder
    content = json.loads((source / demo_dataset.ANNOTATION_FILE).read_text())
    assert sorted(row["file_name"] for row in content["images"]) == sorted(
        p.name for p in (source / "images").iterdir()
    )
    for row in content["images"]:
        with Image.open(source / "images" / row["file_name"]) as image:
            image.load()
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (row["width"], row["height"]))


def test_the_committed_pictures_are_what_the_command_draws(folder):
    committed, drawn = (json.loads((f / demo_dataset.ANNOTATION_FILE).read_text()) for f in (DEMO, folder))
    assert committed["images"] == drawn["images"]
    assert committed["categories"] == drawn["categories"]
    for one, other in zip(committed["annotations"], drawn["annotations"], strict=True):
        assert one["bbox"] == pytest.approx(other["bbox"], abs=0.02)  # another numpy may round the last digit otherwise
    for file in (DEMO / "images").iterdir():
        pixels = [np.asarray(Image.open(io.BytesIO((f / "images" / file.name).read_bytes()))) for f in (DEMO, folder)]
        assert np.abs(pixels[0].astype(int) - pixels[1]).mean() < 2  # another libjpeg may, too


def test_the_committed_files_are_small():
    pictures = [DEMO / demo_dataset.ANNOTATION_FILE, *(DEMO / "images").iterdir()]
    assert sum(file.stat().st_size for file in pictures) < 1e6
    assert (DEMO / "detr_demo.pth").stat().st_size <= 14e6


def test_the_checkpoint_is_the_one_the_readme_describes():
    (stated,) = re.findall(r"\b[0-9a-f]{64}\b", (DEMO / "README.md").read_text(encoding="utf-8"))
    assert hashlib.sha256((DEMO / "detr_demo.pth").read_bytes()).hexdigest() == stated


def test_the_checkpoint_fits_the_recorded_architecture():
    checkpoint = torch.load(DEMO / "detr_demo.pth", weights_only=True)
    assert list(checkpoint) == ["model"]
    assert {value.dtype for value in checkpoint["model"].values()} == {torch.float16}
    train_demo.DETR(train_demo.ARCHITECTURE).load_state_dict(checkpoint["model"])


def test_run_lengths_go_down_the_columns_from_a_run_of_zeros():
    assert demo_dataset.run_lengths(np.array([[True, False], [True, True]])) == [0, 2, 1, 1]
    assert demo_dataset.run_lengths(np.array([[False, False], [True, True]])) == [1, 1, 1, 1]


def test_the_loss_is_small_for_right_predictions_only():
    labels, boxes = [torch.tensor([3, 7])], [torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.7, 0.6, 0.2, 0.4]])]
    logits = torch.full((1, 2, 4, 15), -20.0)
    logits[..., 14] = 20
    logits[:, :, 1] = torch.eye(15)[7] * 40 - 20
    logits[:, :, 2] = torch.eye(15)[3] * 40 - 20
    predicted = torch.full((1, 2, 4, 4), 0.5)
    predicted[:, :, 1], predicted[:, :, 2] = boxes[0][1], boxes[0][0]
    assert train_demo.detection_loss(logits, predicted, labels, boxes) < 1e-4
    assert train_demo.detection_loss(logits, predicted.flip(2), labels, boxes) > 1
    assert train_demo.detection_loss(logits, predicted, [labels[0].flip(0)], boxes) > 1


def test_the_loss_of_a_batch_without_objects_is_finite():
    logits = torch.zeros(2, 3, 4, 15, requires_grad=True)
    boxes = torch.full((2, 3, 4, 4), 0.5, requires_grad=True)
    none = [torch.zeros(0, dtype=torch.int64)] * 2, [torch.zeros(0, 4)] * 2
    loss = train_demo.detection_loss(logits, boxes, *none)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


def test_mirroring_moves_the_boxes_with_the_pixels():
    pixels = np.zeros((3, 8, 16), dtype=np.uint8)
    pixels[:, 2:4, 1:5] = 255
    example = (pixels, np.array([1]), np.array([[3 / 16, 3 / 8, 4 / 16, 2 / 8]], dtype=np.float32))
    batch, labels, boxes = next(train_demo.batches([example] * 16, 16, torch.Generator().manual_seed(0)))
    assert len({box.sum().item() for box in boxes}) == 2  # some are mirrored, some are not
    for image, box in zip(batch, boxes, strict=True):
        cx, _, width, _ = (box[0] * 16).tolist()
        assert (image[0, 3] > 0).nonzero().flatten().tolist() == list(range(int(cx - width / 2), int(cx + width / 2)))
    assert len(labels) == 16


def test_a_crop_shows_its_object():
    examples = [train_demo.example(seed=4, number=number) for number in range(1, 7)]
    pixels, labels = train_demo.crops(examples, 32, torch.Generator().manual_seed(0))
    assert pixels.shape == (sum(len(some) for _, some, _ in examples), 3, 32, 32)
    assert labels.tolist() == [label for _, some, _ in examples for label in some]

    marked = np.zeros((3, 60, 90), dtype=np.uint8)
    marked[:, 40:60, 60:90] = 255  # in the corner, where a loose crop would leave the picture
    box = np.array([[75 / 90, 50 / 60, 30 / 90, 20 / 60]], dtype=np.float32)
    pixels, _ = train_demo.crops([(marked, np.array([1]), box)] * 8, 32, torch.Generator().manual_seed(0))
    side = (pixels[:, 0] > 127).sum((1, 2)).sqrt()
    assert ((side > 10) & (side < 29)).all()


def test_places_start_from_boxes_around_themselves():
    heads = train_demo.PlaceHeads()
    torch.nn.init.zeros_(heads.boxes.weight)
    torch.nn.init.zeros_(heads.boxes.bias)
    logits, boxes = heads(torch.zeros(2, 6, train_demo.ARCHITECTURE.hidden_dim), height=2, width=3)
    assert logits.shape == (2, 1, 6, train_demo.ARCHITECTURE.num_logits)
    assert boxes[1, 0, 4].tolist() == pytest.approx([0.5, 0.75, 0.3, 0.3])  # second row, second column


def test_training_steps_leave_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(train_demo, "draw_examples", lambda n, seed: [train_demo.example(seed, i) for i in range(n)])
    path = tmp_path / "tiny.pth"
    train_demo.train(path, images=16, pretraining=2, steps=3, decay=2, batch_size=4, learning_rate=3e-4, seed=0)
    state = torch.load(path, weights_only=True)["model"]
    assert all(value.isfinite().all() for value in state.values())
    assert not (state["backbone.0.body.bn1.running_mean"] == 0).all()
