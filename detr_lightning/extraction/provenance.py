"""How embeddings are made: what their metadata tells besides the images."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer

from detr_lightning import __version__
from detr_lightning.data.datamodule import COCODataModule
from detr_lightning.extractor import DETRExtractor
from detr_lightning.model.detr import MEAN, STD

PACKAGES = ("lightning", "torch", "torchvision", "pillow")
"""Whose versions are told: what numbers may depend on."""


def provenance(
    trainer: Trainer, model: DETRExtractor, data: COCODataModule, writer: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the metadata of a run, without what belongs to single images.

    Args:
        trainer: Who computes, where and in which precision.
        model: The model.
        data: The images.
        writer: The writer's settings, `dtype` among them.
    """
    checkpoint = model.checkpoint
    return {
        "extract_type": model.hparams["extract_type"],
        "embedding_keys": list(model.keys),
        "categories": {str(number): name for number, name in sorted(data.categories.items())},
        "model": {
            "weights": checkpoint.name,
            "sha256": checkpoint.sha256,
            "architecture": vars(model.detr.architecture),
        },
        "preprocessing": {**data.preprocessing, "mean": MEAN, "std": STD},
        "batching": data.batching,
        "dtype": writer["dtype"],
        "precision": str(trainer.precision) + (", TF32" if model.hparams["tf32"] else ""),
        "versions": {
            "detr-lightning": __version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "config": {
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
    }
