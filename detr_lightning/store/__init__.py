"""The folder that an extraction leaves: written by `layout`, read by `EmbeddingStore`, checked by `verify`."""

from detr_lightning.store.store import EmbeddingStore

__all__ = ["EmbeddingStore"]
