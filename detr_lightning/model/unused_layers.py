"""Removal of unused backbone layers from networks that this package did not build."""

from __future__ import annotations

from typing import Any

from torch import nn


def drop_unused_layers(model: nn.Module) -> nn.Module:
    """Drop the layers of a vision transformer after the last one whose features it returns, in place.

    RF-DETR and LW-DETR read the features of some layers, but not of the last, which transformers computes all the same.
    Stages are named `stem`, `stage1`, ..., each the output of one layer.
    """
    modules: list[Any] = list(model.modules())
    for module in modules:
        encoder = getattr(module, "encoder", None)
        layers = getattr(encoder, "layer", None)
        names = getattr(module, "stage_names", None)
        if isinstance(encoder, nn.Module) and isinstance(layers, nn.ModuleList) and names is not None:
            last = max(names.index(name) for name in module.out_features)
            if len(names) == len(layers) + 1:
                encoder.layer = layers[:last]
    return model
