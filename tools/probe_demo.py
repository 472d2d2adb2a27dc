"""Ask how well the queries' embeddings of assets/demo's DETR tell classes apart, on pictures it has never seen.

    python -m detr_lightning.demo.pictures data/held_out --images 500 --seed 1
    python tools/probe_demo.py data/held_out

The probe is a logistic regression from the embedding of each query matched with an object to the object's class, fitted
on half of the pictures and scored on the other half.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO
from scipy.optimize import linear_sum_assignment
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torchvision.ops import box_convert, box_iou

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

from detr_lightning.demo.pictures import ANNOTATION_FILE
from detr_lightning.format.preprocessing import resized_size
from detr_lightning.model.detr import DETR
from tools.train_demo import ARCHITECTURE, LONG_SIDE, SHORT_SIDE

ROOT = Path(__file__).resolve().parents[1]


@torch.inference_mode()
def predict(model: DETR, coco: COCO, folder: Path) -> dict[int, dict[str, Tensor]]:
    """Run the model over every picture, one at a time; boxes come back as `x1, y1, x2, y2` in pixels."""
    outputs = {}
    for image_id, record in coco.imgs.items():
        height, width = resized_size((record["height"], record["width"]), SHORT_SIDE, LONG_SIDE)
        with Image.open(folder / "images" / record["file_name"]) as image:
            pixels = np.array(image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR))
        out = model(torch.from_numpy(pixels).permute(2, 0, 1)[None], keys=("decoder_output", "pred_boxes"))
        scale = torch.tensor([record["width"], record["height"]] * 2)
        corners = box_convert(out["pred_boxes"][0], "cxcywh", "xyxy") * scale
        outputs[image_id] = {"layers": out["decoder_output"][0], "corners": corners}
    return outputs


def probe(coco: COCO, outputs: dict[int, dict[str, Tensor]]) -> list[float]:
    """Return the probe's accuracy for every decoder layer; queries are matched by the overlap of their boxes."""
    embeddings, labels, fitted = [], [], []
    for image_id, out in outputs.items():
        objects = [row for row in coco.imgToAnns[image_id] if not row["iscrowd"]]
        if not objects:
            continue
        truth = box_convert(torch.tensor([row["bbox"] for row in objects]), "xywh", "xyxy")
        queries, targets = linear_sum_assignment(box_iou(out["corners"], truth).numpy(), maximize=True)
        embeddings += [out["layers"][:, query].numpy() for query in queries]
        labels += [objects[target]["category_id"] for target in targets]
        fitted += [image_id % 2 == 0] * len(targets)
    x, y, fit = np.stack(embeddings), np.array(labels), np.array(fitted)
    accuracies = []
    for layer in range(x.shape[1]):
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
        classifier.fit(x[fit, layer], y[fit])
        accuracies.append(float(classifier.score(x[~fit, layer], y[~fit])))
    return accuracies


def main() -> None:
    """Read the command line; probe the checkpoint, and random weights for comparison."""
    parser = argparse.ArgumentParser(description="Probe the query embeddings of assets/demo's small DETR.")
    parser.add_argument("folder", type=Path, help="a dataset from detr_lightning/demo/pictures.py")
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "assets/demo/detr_demo.pth")
    arguments = parser.parse_args()
    coco = COCO(str(arguments.folder / ANNOTATION_FILE))
    torch.manual_seed(0)
    model = DETR(ARCHITECTURE).eval()
    random = probe(coco, predict(model, coco, arguments.folder))
    model.load_state_dict(torch.load(arguments.checkpoint, weights_only=True)["model"])
    trained = probe(coco, predict(model, coco, arguments.folder))
    for layer, accuracies in enumerate(zip(trained, random, strict=True), start=1):
        print("decoder layer {}: trained {:.3f}, random weights {:.3f}".format(layer, *accuracies))


if __name__ == "__main__":
    main()
