"""DETR in plain torch and torchvision."""

from detr_lightning.model.detr.detr import DETR, MEAN, STD, Architecture, normalise
from detr_lightning.model.detr.folding import fold

__all__ = ["DETR", "MEAN", "STD", "Architecture", "fold", "normalise"]
