"""DETR in plain torch and torchvision."""

from detr_lightning.model.detr.detr import DETR, Architecture, normalise
from detr_lightning.model.detr.folding import fold

__all__ = ["DETR", "Architecture", "fold", "normalise"]
