"""The provenance of embeddings: everything that their metadata records except the images."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Trainer

from detr_lightning import __version__
from detr_lightning.data.datamodule import COCODataModule
from detr_lightning.extractor import DETRExtractor
from detr_lightning.format.identity import ModelRecord, RunSettings
from detr_lightning.format.keys import QUERY_INDEX
from detr_lightning.format.schema import RunRecord

PACKAGES = ("lightning", "torch", "torchvision", "pillow")
"""Packages whose versions are recorded, since the numbers may depend on them."""


def provenance(trainer: Trainer, model: DETRExtractor, data: COCODataModule, writer: Mapping[str, Any]) -> RunRecord:
    """Return the record of a run: its metadata without the images.

    Args:
        trainer: The Trainer, with its devices and precision.
        model: The model.
        data: The images.
        writer: The writer's settings, including `dtype` and `min_score`.
    """
    checkpoint = model.checkpoint
    settings = RunSettings(
        model=ModelRecord(
            weights=checkpoint.name,
            sha256=checkpoint.sha256,
            architecture=model.detr.architecture.to_json(),
            family=checkpoint.family,
            scoring=checkpoint.scoring,
            category_ids=checkpoint.category_ids,
        ),
        keys=model.keys if writer["min_score"] is None else (*model.keys, QUERY_INDEX),
        dtype=writer["dtype"],
        preprocessing={
            **data.preprocessing,
            "mean": checkpoint.preprocessing.mean,
            "std": checkpoint.preprocessing.std,
        },
        batching=data.batching,
        precision=str(trainer.precision) + (", TF32" if model.hparams["tf32"] else ""),
        min_score=writer["min_score"],
    )
    return RunRecord(
        extract_type=model.hparams["extract_type"],
        settings=settings,
        categories=checkpoint.category_names or _names_by_index(data.categories, checkpoint.category_ids),
        versions={
            "detr-lightning": __version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        config={
            "model": dict(model.hparams),
            "data": dict(data.hparams),
            "writer": dict(writer),
            "trainer": {
                "accelerator": trainer.accelerator.__class__.__name__,
                "devices": trainer.num_devices,
                "num_nodes": trainer.num_nodes,
                "precision": str(trainer.precision),
            },
        },
    )


def _names_by_index(categories: Mapping[int, str], category_ids: Sequence[int] | None) -> dict[int, str]:
    """Return the annotations' names by logit index, as far as the categories of the logits are known."""
    ids = category_ids or ()
    return {index: categories[number] for index, number in enumerate(ids) if number in categories}
