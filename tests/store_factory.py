"""Extractions made by hand, so that what reads them is tested without a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from places import SHARED

from detr_lightning.format import files, identity, names, schema
from detr_lightning.format.entries import ImageEntry
from detr_lightning.format.keys import EXTRACT_TYPES, FeatureSizes, ModelShape, dtype_of, shape_of
from detr_lightning.store import EmbeddingStore

COCO = SHARED / "coco"
COCO_ANNOTATIONS = COCO / "annotations" / "instances_val2017.json"

ARCHITECTURE: dict[str, Any] = {
    "block": "basic",
    "blocks": [2, 2, 2, 2],
    "hidden_dim": 16,
    "nheads": 4,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "feedforward_dim": 32,
    "num_queries": 10,
    "num_logits": 92,
    "dilation": False,
}
CATEGORIES = {1: "person", 3: "car", 18: "dog"}


def annotations_of(images: int = 4, objects: int = 3, seed: int = 0) -> dict[str, Any]:
    """Return a small annotation file's content: images of two sizes, a crowd, objects of every area class."""
    generator = torch.Generator().manual_seed(seed)
    content: dict[str, Any] = {
        "info": {},
        "images": [],
        "annotations": [],
        "categories": [{"id": index, "name": name} for index, name in CATEGORIES.items()],
    }
    for number in range(images):
        width, height = ((640, 480), (480, 640))[number % 2]
        image_id = 7 + 10 * number
        file_name = f"{image_id:012d}.jpg"
        content["images"].append({"id": image_id, "file_name": file_name, "width": width, "height": height})
        for index in range(objects):
            size = (20, 60, 150)[index % 3]
            x, y = (torch.rand(2, generator=generator) * 100 + 130 * index).tolist()
            w, h = (size * (1 + 0.3 * torch.rand(2, generator=generator))).tolist()
            content["annotations"].append(
                {
                    "id": 1000 * number + index + 1,
                    "image_id": image_id,
                    "category_id": list(CATEGORIES)[(number + index) % 3],
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                    "weather": "rain",
                }
            )
    return content


def make_store(
    folder: Path,
    content: dict[str, Any] | None = None,
    *,
    keys: Sequence[str] = EXTRACT_TYPES["decoder"],
    dtype: str = "float32",
    image_dir: Path | None = None,
    seed: int = 0,
    **architecture: Any,
) -> EmbeddingStore:
    """Write a finished extraction whose predictions are exactly the annotations, one query each, crowds left out."""
    content = content or annotations_of()
    sizes = {**ARCHITECTURE, **architecture}
    shape = ModelShape.of_architecture(sizes)
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(sizes["num_logits"], sizes["hidden_dim"], generator=generator)
    folder.mkdir(parents=True)
    images = []
    for image in sorted(content["images"], key=lambda image: image["id"]):
        feature_size = (-(-image["height"] // 64), -(-image["width"] // 64))
        tensors = {
            key: torch.randn(shape_of(key, shape, FeatureSizes.single(feature_size)), generator=generator)
            for key in dict.fromkeys((*keys, "decoder_output", "cross_attention", "pred_logits", "pred_boxes"))
        }
        objects = [a for a in content["annotations"] if a["image_id"] == image["id"] and not a.get("iscrowd")]
        _predict(tensors, objects, (image["height"], image["width"]), feature_size, centers)
        tensors["query_embeddings"] = tensors["decoder_output"][-1].clone()
        stored = {key: tensors[key].to(dtype_of(key, dtype)) for key in keys}
        saved = files.save_tensors(folder, image["id"], stored)
        images.append(
            ImageEntry(
                *(image[name] for name in ("id", "file_name", "width", "height")),
                input_size=(feature_size[0] * 32, feature_size[1] * 32),
                features=FeatureSizes.single(feature_size),
                bytes=saved.bytes,
                checksum=saved.checksum,
            )
        )
    run = schema.RunRecord(
        extract_type="decoder",
        settings=identity.RunSettings(
            model=identity.ModelRecord(weights="random", sha256="0" * 64, architecture=sizes),
            keys=tuple(keys),
            dtype=dtype,
            preprocessing={"short_side": 800, "long_side": 1333, "image_backend": "pil"},
            batching="exact",
            precision="32-true",
        ),
        categories={category["id"]: category["name"] for category in content["categories"]},
        versions={"torch": torch.__version__},
        config={"data": {"image_dir": str(image_dir) if image_dir else None}},
    )
    metadata = schema.Metadata(run=run, images=images).to_json()
    files.write_json(folder / names.METADATA, metadata, checksum=True)
    return EmbeddingStore(folder)


def plain(store: EmbeddingStore, image_id: int) -> dict[str, torch.Tensor]:
    """What a user reads without this package."""
    return torch.load(store.folder / f"embedding_{image_id:012d}.pt")


def edit_metadata(folder: Path, **changes: Any) -> None:
    """Change keys of a folder's metadata, which then has no checksum; None removes one."""
    path = folder / names.METADATA
    metadata = json.loads(path.read_text()) | {"checksum": None} | changes
    path.write_text(json.dumps({key: value for key, value in metadata.items() if value is not None}))


def _predict(
    tensors: dict[str, torch.Tensor],
    objects: list[dict[str, Any]],
    size: tuple[int, int],
    feature_size: tuple[int, int],
    centers: torch.Tensor,
) -> None:
    """Make the first queries predict the objects and the others nothing; embeddings gather around their category."""
    height, width = size
    logits, boxes, decoder = tensors["pred_logits"], tensors["pred_boxes"], tensors["decoder_output"]
    logits.mul_(0.5)
    logits[:, -1] += 8
    boxes.sigmoid_()
    rows, columns = torch.meshgrid(*(torch.arange(side) + 0.5 for side in feature_size), indexing="ij")
    layers = torch.linspace(0.2, 1, len(decoder))[:, None]
    for query, annotation in enumerate(objects[: len(logits)]):
        x, y, w, h = annotation["bbox"]
        boxes[query] = torch.tensor([(x + w / 2) / width, (y + h / 2) / height, w / width, h / height])
        logits[query, -1] -= 16
        logits[query, annotation["category_id"]] += 8 + (query % 5)
        noise = decoder[:, query].clone()
        decoder[:, query] = layers * centers[annotation["category_id"]] + 0.6 * noise
        distance = ((columns / feature_size[1] - boxes[query, 0]) / boxes[query, 2]) ** 2
        distance = distance + ((rows / feature_size[0] - boxes[query, 1]) / boxes[query, 3]) ** 2
        tensors["cross_attention"][:, query] = (-4 * distance.flatten() / layers**2).clamp(min=-50)
    tensors["cross_attention"].copy_(tensors["cross_attention"].softmax(-1))
