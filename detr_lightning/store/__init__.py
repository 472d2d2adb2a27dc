"""The output of an extraction: reading, checking, exporting and converting it."""

from detr_lightning.store.store import EmbeddingStore

__all__ = ["EmbeddingStore"]
