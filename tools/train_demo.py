"""Train the small DETR of assets/demo from scratch, on a CPU, on pictures from detr_lightning/demo/pictures.py.

    python tools/train_demo.py assets/demo/detr_demo.pth

Every 500 steps the file is written anew with the moving average of the weights, in half precision and in the layout
of the official checkpoints, so a run that is stopped early leaves a usable one. On SIGUSR1 the learning rate begins its
final fall at once; the run then ends as one with fewer `--steps` would have.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.ops import FrozenBatchNorm2d, box_convert, generalized_box_iou, generalized_box_iou_loss

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, installed or not

from detr_lightning.demo.pictures import CATEGORIES, draw_picture
from detr_lightning.format.preprocessing import resized_size
from detr_lightning.model.detr import DETR, Architecture, normalise

SHORT_SIDE, LONG_SIDE = 128, 213
ARCHITECTURE = Architecture(
    block="basic",
    blocks=(1, 1, 1, 1),
    hidden_dim=128,
    encoder_layers=3,
    decoder_layers=3,
    feedforward_dim=512,
    num_queries=16,
    num_logits=max(CATEGORIES) + 2,  # every id up to the largest, and "no object"
)
NO_OBJECT_WEIGHT, CLASS_WEIGHT, BOX_WEIGHT, GIOU_WEIGHT = 0.1, 2.0, 5.0, 2.0
WARMUP, WRITE_EVERY = 300, 500

Example = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Pixels `[3, h, w]` in uint8, labels `[N]`, boxes `[N, 4]` as relative `cx, cy, w, h`."""
Batch = tuple[Tensor, list[Tensor], list[Tensor]]


def example(seed: int, number: int) -> Example:
    """Draw a picture, resize it as the package does, and leave crowds out, as official DETR does."""
    picture = draw_picture(seed, number)
    height, width = resized_size((picture.height, picture.width), SHORT_SIDE, LONG_SIDE)
    image = Image.open(io.BytesIO(picture.jpeg)).resize((width, height), Image.Resampling.BILINEAR)
    objects = [annotation for annotation in picture.annotations if not annotation["iscrowd"]]
    boxes = np.array([annotation["bbox"] for annotation in objects], dtype=np.float32).reshape(-1, 4)
    boxes[:, :2] += boxes[:, 2:] / 2
    boxes /= np.array([picture.width, picture.height] * 2, dtype=np.float32)
    labels = np.array([annotation["category_id"] for annotation in objects], dtype=np.int64)
    return np.asarray(image).transpose(2, 0, 1), labels, boxes


def draw_examples(images: int, seed: int) -> list[Example]:
    """Draw the training set in parallel."""
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        return pool.starmap(example, ((seed, number) for number in range(1, images + 1)), chunksize=64)


def batches(examples: list[Example], batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
    """Yield batches for ever, each of one shape; pictures are mirrored and their colour channels swapped at random."""
    shapes: dict[tuple[int, ...], list[int]] = {}
    for index, (pixels, _, _) in enumerate(examples):
        shapes.setdefault(pixels.shape, []).append(index)
    while True:
        epoch: list[Tensor] = []
        for members in shapes.values():
            order = torch.tensor(members)[torch.randperm(len(members), generator=generator)]
            epoch += [chunk for chunk in order.split(batch_size) if len(chunk) == batch_size]
        for position in torch.randperm(len(epoch), generator=generator).tolist():
            chosen = [examples[index] for index in epoch[position].tolist()]
            pixels = torch.from_numpy(np.stack([pixels for pixels, _, _ in chosen]))
            labels = [torch.from_numpy(labels) for _, labels, _ in chosen]
            boxes = [torch.from_numpy(boxes).clone() for _, _, boxes in chosen]
            mirrored = torch.rand(batch_size, generator=generator) < 0.5
            pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
            for index in mirrored.nonzero().flatten().tolist():
                boxes[index][:, 0] = 1 - boxes[index][:, 0]
            pixels = pixels[:, torch.randperm(3, generator=generator)]
            yield pixels.contiguous(memory_format=torch.channels_last), labels, boxes


def detection_loss(logits: Tensor, boxes: Tensor, labels: list[Tensor], target_boxes: list[Tensor]) -> Tensor:
    """Match every decoder layer's predictions to the objects, and sum DETR's losses over the layers.

    Args:
        logits: `[B, L, Q, num_logits]`.
        boxes: `[B, L, Q, 4]`, relative `cx, cy, w, h`.
        labels: For each image `[N]`.
        target_boxes: For each image `[N, 4]`.
    """
    layers, queries, no_object = logits.shape[1], logits.shape[2], logits.shape[3] - 1
    logits, boxes = logits.flatten(0, 1), boxes.flatten(0, 1)  # [B*L, Q, ...]
    all_labels, all_boxes = torch.cat(labels), torch.cat(target_boxes)
    all_corners = box_convert(all_boxes, "cxcywh", "xyxy")
    with torch.no_grad():
        flat = boxes.flatten(0, 1)
        cost = BOX_WEIGHT * torch.cdist(flat, all_boxes, p=1)
        cost -= CLASS_WEIGHT * logits.softmax(-1).flatten(0, 1)[:, all_labels]
        cost -= GIOU_WEIGHT * generalized_box_iou(box_convert(flat, "cxcywh", "xyxy"), all_corners)
        costs = cost.unflatten(0, (-1, layers, queries)).numpy()  # [B, L, Q, all objects]
    rows, chosen, targets = [], [], []
    first = 0
    for image, count in enumerate(map(len, labels)):
        for layer in range(layers):
            query, target = linear_sum_assignment(costs[image, layer, :, first : first + count])
            rows += [image * layers + layer] * count
            chosen += query.tolist()
            targets += (first + target).tolist()
        first += count

    classes = torch.full(logits.shape[:2], no_object)
    classes[rows, chosen] = all_labels[targets]
    weight = torch.ones(no_object + 1)
    weight[no_object] = NO_OBJECT_WEIGHT
    loss = CLASS_WEIGHT * layers * F.cross_entropy(logits.flatten(0, 1), classes.flatten(), weight)
    matched, objects = boxes[rows, chosen], max(len(all_labels), 1)
    loss = loss + BOX_WEIGHT * F.l1_loss(matched, all_boxes[targets], reduction="sum") / objects
    corners = box_convert(matched, "cxcywh", "xyxy")
    return loss + GIOU_WEIGHT * generalized_box_iou_loss(corners, all_corners[targets], reduction="sum") / objects


class PlaceHeads(nn.Module):
    """Heads on every place of the encoder's output, for a loss that only training has.

    Each place proposes a box near itself, as in two-stage Deformable DETR (https://arxiv.org/abs/2010.04159). It
    teaches the encoder classes and places before the decoder's queries have learned where to look.
    """

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Linear(ARCHITECTURE.hidden_dim, ARCHITECTURE.num_logits)
        self.boxes = nn.Linear(ARCHITECTURE.hidden_dim, 4)

    def forward(self, encoded: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Return logits `[B, 1, H*W, num_logits]` and boxes `[B, 1, H*W, 4]`, as of one decoder layer."""
        y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
        start = torch.stack([x, y, torch.full_like(x, 0.3), torch.full_like(x, 0.3)], dim=-1).flatten(0, 1)  # [H*W, 4]
        return self.logits(encoded)[:, None], (self.boxes(encoded) + start.logit()).sigmoid()[:, None]


def crops(examples: list[Example], size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Cut a square around every object, loosely, and return pixels `[N, 3, size, size]` in uint8 and labels `[N]`."""
    pixels, labels = [], []
    for picture, picture_labels, boxes in examples:
        height, width = picture.shape[1:]
        for label, (cx, cy, w, h) in zip(picture_labels.tolist(), boxes.tolist(), strict=True):
            loose = torch.rand(3, generator=generator).tolist()
            side = min(int(max(w * width, h * height) * (1.1 + loose[0])), height, width)
            left = int(min(max(cx * width - side * (0.4 + 0.2 * loose[1]), 0), width - side))
            top = int(min(max(cy * height - side * (0.4 + 0.2 * loose[2]), 0), height - side))
            crop = Image.fromarray(picture[:, top : top + side, left : left + side].transpose(1, 2, 0))
            pixels.append(np.asarray(crop.resize((size, size), Image.Resampling.BILINEAR)))
            labels.append(label)
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), torch.tensor(labels)


def pretrain(model: DETR, examples: list[Example], steps: int, generator: torch.Generator) -> None:
    """Teach the backbone to tell the classes apart on crops of single objects, as DETR's was taught on ImageNet."""
    pixels, labels = crops(examples, 64, generator)
    backbone, classifier = model.backbone[0], nn.Linear(ARCHITECTURE.feature_channels, ARCHITECTURE.num_logits)
    optimizer = torch.optim.AdamW([*backbone.parameters(), *classifier.parameters()], weight_decay=1e-4, fused=True)
    for step in range(steps):
        chosen = torch.randint(len(labels), (64,), generator=generator)
        images = pixels[chosen][:, torch.randperm(3, generator=generator)].contiguous(memory_format=torch.channels_last)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min((step + 1) / 50, 1 - step / steps)
        logits = classifier(backbone(normalise(images)).mean((2, 3)))
        loss = F.cross_entropy(logits, labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 50 == 0:
            right = (logits.argmax(1) == labels[chosen]).float().mean().item()
            print(f"backbone, step {step + 1} of {steps}: loss {loss.item():.3f}, accuracy {right:.2f}", flush=True)


def trainable() -> DETR:
    """Return a new model whose norms learn, its transformer initialised as in the paper."""
    model = DETR(ARCHITECTURE)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, FrozenBatchNorm2d):
                setattr(parent, name, nn.BatchNorm2d(child.weight.numel(), eps=child.eps))
    for parameter in model.transformer.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    return model.to(memory_format=torch.channels_last)


def write_checkpoint(model: DETR, path: Path) -> None:
    """Write the weights in half precision under the names of the official checkpoints, norms frozen."""
    state = model.state_dict()
    names = DETR(ARCHITECTURE).state_dict()
    partial = path.with_suffix(".partial")
    torch.save({"model": {name: state[name].half().contiguous() for name in names}}, partial)
    partial.replace(path)


def train(
    path: Path,
    *,
    images: int,
    pretraining: int,
    steps: int,
    decay: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> None:
    """Train for a number of steps, the learning rate constant until its linear fall over the last `decay` steps."""

    def fall_now(*_: object) -> None:
        nonlocal steps
        steps = min(steps, step + decay)

    step = 0
    signal.signal(signal.SIGUSR1, fall_now)
    began = time.monotonic()
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    examples = draw_examples(images, seed)
    print(f"{images} pictures after {time.monotonic() - began:.0f} s", flush=True)
    model = trainable().train()
    pretrain(model, examples, pretraining, generator)
    data = batches(examples, batch_size, generator)
    place_heads = PlaceHeads()
    parameters = [*model.parameters(), *place_heads.parameters()]
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.998), use_buffers=True)
    optimizer = torch.optim.AdamW(parameters, weight_decay=1e-4, fused=True)
    recent = recent_place = 0.0
    while step < steps:
        pixels, labels, boxes = next(data)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min((step + 1) / WARMUP, 1, (steps - step) / decay)
        out = model(pixels, keys=("encoder_output", "decoder_output"))
        loss = detection_loss(*model.predict(out["decoder_output"]), labels, boxes)
        places = place_heads(out["encoder_output"], *ARCHITECTURE.feature_size(pixels.shape[-2:]))
        place_loss = detection_loss(*places, labels, boxes)
        optimizer.zero_grad()
        (loss + place_loss).backward()
        nn.utils.clip_grad_norm_(parameters, 0.1)
        optimizer.step()
        average.update_parameters(model)
        step += 1
        recent, recent_place = recent + loss.item() / 100, recent_place + place_loss.item() / 100
        if step % 100 == 0:
            print(
                f"step {step} of {steps}: loss {recent:.3f} and {recent_place:.3f}, {time.monotonic() - began:.0f} s",
                flush=True,
            )
            recent = recent_place = 0.0
        if step % WRITE_EVERY == 0 or step == steps:
            write_checkpoint(average.module, path)


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description="Train the small DETR of assets/demo.")
    parser.add_argument("checkpoint", type=Path, help="the file to write")
    parser.add_argument("--images", type=int, default=16000, help="pictures in the training set")
    parser.add_argument("--pretraining", type=int, default=300, help="steps of teaching the backbone alone")
    parser.add_argument("--steps", type=int, default=3400)
    parser.add_argument("--decay", type=int, default=1500, help="steps of the learning rate's final fall")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = vars(parser.parse_args())
    train(arguments.pop("checkpoint"), **arguments)


if __name__ == "__main__":
    main()
