"""Layers of a backbone that nothing reads, in networks that this package did not build."""

from __future__ import annotations

from typing import Any

from torch import nn


def drop_unused_layers(model: nn.Module) -> nn.Module:
    """Drop the layers after the last one whose features a vision transformer returns, in place.

    RF-DETR and LW-DETR read the features of chosen layers, and the last of all is not among them; transformers computes
    it all the same. Stages are named `stem`, `stage1`, ..., each the output of one layer.
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
