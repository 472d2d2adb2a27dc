"""Extract DETR embeddings for COCO or any folder of images."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detr_lightning.api import extract
    from detr_lightning.data.datamodule import COCODataModule
    from detr_lightning.extraction.writer import EmbeddingWriter
    from detr_lightning.extractor import DETRExtractor
    from detr_lightning.store import EmbeddingStore

__version__ = "0.1.0"

__all__ = ["COCODataModule", "DETRExtractor", "EmbeddingStore", "EmbeddingWriter", "extract"]

# Imported on first use: reading a folder of embeddings should not import Lightning.
_MODULES = {
    "COCODataModule": "detr_lightning.data.datamodule",
    "DETRExtractor": "detr_lightning.extractor",
    "EmbeddingStore": "detr_lightning.store",
    "EmbeddingWriter": "detr_lightning.extraction.writer",
    "extract": "detr_lightning.api",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
