"""The sizes of a DETR, read from its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from detr_lightning.errors import InputError
from detr_lightning.model.detr.detr import Architecture
from detr_lightning.model.state_dicts import taken_for

BODY = "backbone.0.body."
ENCODER = "transformer.encoder.layers."
DECODER = "transformer.decoder.layers."


def read_sizes(name: str, tensors: Mapping[str, Tensor]) -> Architecture:
    """Read the sizes of a DETR from its tensors. Sizes that they do not show keep their defaults.

    Args:
        name: The file or folder, for messages.
        tensors: The tensors under their official names.

    Raises:
        InputError: The tensors are not those of a DETR.
    """

    def shape(key: str, dims: int) -> torch.Size:
        if key not in tensors or tensors[key].dim() != dims:
            kind = taken_for(tensors)
            looks = f" It looks like {kind}." if kind else ""
            raise InputError(f"{name} is not a DETR: {key} is {'misshaped' if key in tensors else 'missing'}.{looks}")
        return tensors[key].shape

    def layers(prefix: str) -> int:
        return len({key[len(prefix) :].partition(".")[0] for key in tensors if key.startswith(prefix)})

    queries, hidden_dim = shape("query_embed.weight", 2)
    learned = "backbone.1.row_embed.weight" in tensors
    return Architecture(
        block="bottleneck" if BODY + "layer1.0.conv3.weight" in tensors else "basic",
        blocks=tuple(layers(f"{BODY}layer{stage}.") for stage in (1, 2, 3, 4)),
        hidden_dim=hidden_dim,
        encoder_layers=layers(ENCODER),
        decoder_layers=layers(DECODER),
        feedforward_dim=shape(ENCODER + "0.linear1.weight", 2)[0],
        num_queries=queries,
        num_logits=shape("class_embed.weight", 2)[0],
        pre_norm="transformer.encoder.norm.weight" in tensors,
        learned_positions=shape("backbone.1.row_embed.weight", 2)[0] if learned else 0,
    )


def check_sizes(architecture: Architecture) -> Architecture:
    """Return the architecture if it can be built.

    Raises:
        InputError: The number of heads does not divide the width, or a ResNet of basic blocks is to be dilated.
    """
    heads, width = architecture.nheads, architecture.hidden_dim
    if heads < 1 or width % heads:
        raise InputError(
            f"model.nheads is {heads}, which does not divide the model's width of {width}. "
            "Set it to the number of heads that the model was trained with."
        )
    if architecture.dilation and architecture.block == "basic":
        raise InputError(
            "model.dilation is True, but only ResNets with bottleneck blocks (50 layers and more) can be dilated. "
            f"This is a {replace(architecture, dilation=False).name}."
        )
    return architecture
