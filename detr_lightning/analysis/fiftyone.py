"""A store as a FiftyOne dataset: detections with their vectors, and the annotated objects."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from detr_lightning.analysis.annotations import read_annotations
from detr_lightning.analysis.objects import objects
from detr_lightning.errors import MissingPackageError
from detr_lightning.store.store import EmbeddingStore

try:
    import fiftyone as fo
except ImportError as missing:
    raise MissingPackageError("FiftyOne is not installed: pip install 'detr-lightning[fiftyone]'.") from missing

DETECTIONS, GROUND_TRUTH, EMBEDDING = "detections", "ground_truth", "embedding"
"""The fields of a sample, and of each of its detections."""


def to_dataset(
    store: EmbeddingStore,
    name: str | None = None,
    *,
    threshold: float = 0.7,
    annotation_file: str | os.PathLike[str] | None = None,
    image_dir: str | os.PathLike[str] | None = None,
) -> Any:
    """Return a FiftyOne dataset of a store's images.

    Each detection has its `embedding`, so that the objects can be searched by similarity and seen on a map:

        import fiftyone.brain as fob

        dataset = to_dataset(store)
        fob.compute_similarity(dataset, patches_field="detections", embeddings="embedding", brain_key="similar")
        fob.compute_visualization(dataset, patches_field="detections", embeddings="embedding", brain_key="map")

    Args:
        store: The extraction, with `query_embeddings`, `pred_logits` and `pred_boxes`.
        name: The dataset's name; by default FiftyOne chooses one.
        threshold: The lowest score of a detection.
        annotation_file: COCO's `instances_*.json` of these images, for the field `ground_truth`.
        image_dir: Where the images are now; by default where they were when they were extracted.

    Raises:
        FileNotFoundError: An image file or the annotation file does not exist.
        InputError: The annotation file is not in COCO's format, or does not match the store's images or categories.
        SettingError: The store lacks a key.
    """
    samples = list(to_samples(store, threshold=threshold, annotation_file=annotation_file, image_dir=image_dir))
    dataset = fo.Dataset(name)
    dataset.add_samples(samples)
    return dataset


def to_samples(
    store: EmbeddingStore,
    *,
    threshold: float = 0.7,
    annotation_file: str | os.PathLike[str] | None = None,
    image_dir: str | os.PathLike[str] | None = None,
) -> Iterator[Any]:
    """Yield a FiftyOne sample per image, without a database. The arguments are those of `to_dataset`."""
    table = objects(store, threshold)
    rows = table.groupby("image_id").indices
    annotated: dict[int, list[dict[str, Any]]] = {}
    names: dict[int, str] = {}
    if annotation_file is not None:
        content = read_annotations(annotation_file, store, whole=False)
        names = content.categories
        for annotation in content.annotations:
            annotated.setdefault(annotation["image_id"], []).append(annotation)
    for image_id in store:
        entry = store.entry(image_id)
        detections = [
            fo.Detection(
                label=row.category,
                bounding_box=_relative(row.bbox, entry.size),
                confidence=float(row.score),
                query=int(row.query),
                embedding=row.embedding,
            )
            for row in table.iloc[rows.get(image_id, [])].itertuples()
        ]
        sample = fo.Sample(
            filepath=str(store.image_path(image_id, image_dir).resolve()),
            metadata=fo.ImageMetadata(width=entry.width, height=entry.height),
            image_id=image_id,
            detections=fo.Detections(detections=detections),
        )
        if annotation_file is not None:
            sample[GROUND_TRUTH] = fo.Detections(
                detections=[
                    fo.Detection(
                        label=names[annotation["category_id"]],
                        bounding_box=_relative(annotation["bbox"], entry.size),
                        iscrowd=bool(annotation["iscrowd"]),
                    )
                    for annotation in annotated.get(image_id, [])
                ]
            )
        yield sample


def _relative(bbox: Any, size: tuple[int, int]) -> list[float]:
    """Return a box `[x, y, width, height]` in pixels relative to the image."""
    height, width = size
    x, y, w, h = bbox
    return [x / width, y / height, w / width, h / height]
