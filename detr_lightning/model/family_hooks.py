"""Hooks that keep the intermediate tensors of transformers' networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from detr_lightning.format.keys import Size


class Seen:
    """The intermediate tensors of a model's run."""

    def __init__(self) -> None:
        self.backbone: list[Tensor] = []
        self.memory: list[Tensor] = []
        self.levels: tuple[Size, ...] = ()
        self.encoder: list[Tensor] = []
        self.decoder: list[Tensor] = []


@contextmanager
def watching(inner: Any, encoder: bool) -> Iterator[Seen]:
    """Keep the intermediate tensors of a model that runs within the block."""
    seen = Seen()

    def before_decoder(_module: nn.Module, _args: Any, settings: Mapping[str, Any]) -> None:
        seen.memory.append(settings["encoder_hidden_states"])
        levels = settings.get("spatial_shapes_list") or ()
        seen.levels = tuple((int(height), int(width)) for height, width in levels)

    hooks = [
        _backbone(inner).register_forward_hook(lambda _m, _a, out: seen.backbone.append(_last_map(out))),
        inner.decoder.register_forward_pre_hook(before_decoder, with_kwargs=True),
        *(layer.register_forward_hook(_appender(seen.decoder)) for layer in inner.decoder.layers),
        *(layer.register_forward_hook(_appender(seen.encoder)) for layer in (inner.encoder.layers if encoder else ())),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _appender(seen: list[Tensor]) -> Callable[[nn.Module, Any, Any], None]:
    def append(_module: nn.Module, _args: Any, out: Any) -> None:
        seen.append(out[0] if isinstance(out, tuple) else out)

    return append


def _backbone(inner: Any) -> nn.Module:
    """Return the module whose output is the backbone's feature maps."""
    if hasattr(inner, "backbone"):
        found: nn.Module = inner.backbone
    else:  # in a convolutional encoder; DEIMv2's also has projections
        encoder = inner.conv_encoder
        found = encoder.backbone if hasattr(encoder, "backbone") else encoder.model
    return found


def _last_map(out: Any) -> Tensor:
    """Return the last feature map of a backbone's output: maps, pairs of a map and its mask, or lists of them."""
    while not isinstance(out, Tensor):
        if hasattr(out, "feature_maps"):
            out = out.feature_maps
        # A pair's second part is a mask or the positions; a list's last entry is its last level.
        out = out[0] if isinstance(out, tuple) and len(out) == 2 and not isinstance(out[0], tuple) else out[-1]
    return out
