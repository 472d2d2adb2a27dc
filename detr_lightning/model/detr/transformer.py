"""The transformer: encoder and decoder, as in figure 10 of the paper (https://arxiv.org/abs/2005.12872).

Everything is batch-first. Positions are added to queries and keys, never to values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_lightning.model.detr import onednn


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool = False) -> Tensor:
    """Apply a linear layer to `[..., C]`, optionally followed by a ReLU."""
    if onednn.usable(x) and onednn.linear_is_faster(x.dtype):
        return onednn.linear(x, weight, bias, relu)
    x = F.linear(x, weight, bias)
    return x.relu() if relu else x


class Linear(nn.Linear):
    """An `nn.Linear` that computes with `linear`."""

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        """Map `[..., in_features]` to `[..., out_features]`."""
        return linear(x, self.weight, self.bias, relu)


def replace_linears(model: nn.Module) -> nn.Module:
    """Replace the linear layers of a model that this package did not build by `Linear`, in place."""
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is nn.Linear:
                faster = Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
                faster.weight, faster.bias = layer.weight, layer.bias
                setattr(module, name, faster)
    return model


class Attention(nn.Module):
    """Multi-head attention with the parameters of `nn.MultiheadAttention`, split into reusable steps.

    Projection is separate from attention, so that an input shared by several layers is projected only once.
    """

    def __init__(self, dim: int, nheads: int) -> None:
        super().__init__()
        self.nheads = nheads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def project(self, x: Tensor, first: int, last: int) -> Tensor:
        """Project `[B, N, dim]` with thirds `first` to `last` of the input projection: 0 query, 1 key, 2 value."""
        rows = slice(first * x.shape[-1], (last + 1) * x.shape[-1])
        return linear(x, self.in_proj_weight[rows], self.in_proj_bias[rows])

    def heads(self, x: Tensor) -> Tensor:
        """Split `[B, N, dim]` into `[B, nheads, N, dim/nheads]`."""
        return x.view(*x.shape[:2], self.nheads, -1).transpose(1, 2)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None = None) -> Tensor:
        """Return the attention's output, `[B, N, dim]`.

        Args:
            query: Projected queries, `[B, N, dim]`.
            key: Projected keys, `[B, M, dim]`.
            value: Projected values, `[B, M, dim]`.
            visible: `[B, 1, 1, M]`, False where a key is padding.
        """
        heads = self.heads(query), self.heads(key), self.heads(value)
        attended = F.scaled_dot_product_attention(*heads, attn_mask=visible)
        out: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        return out

    def weights(self, query: Tensor, key: Tensor, visible: Tensor | None = None) -> Tensor:
        """Return the attention weights, averaged over the heads, `[B, N, M]`, for projected queries and keys."""
        scores = self.heads(query) @ self.heads(key).transpose(-1, -2) * (query.shape[-1] // self.nheads) ** -0.5
        if visible is not None:
            scores = scores.masked_fill(~visible, float("-inf"))
        averaged: Tensor = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).mean(1)
        return averaged


class EncoderLayer(nn.Module):
    """Self-attention over the feature map, then a feed-forward network.

    Norms come after each addition or, with `pre_norm`, before each sublayer.
    """

    def __init__(self, dim: int, nheads: int, feedforward_dim: int, pre_norm: bool = False) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.self_attn = Attention(dim, nheads)
        self.linear1 = Linear(dim, feedforward_dim)
        self.linear2 = Linear(feedforward_dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, position: Tensor, visible: Tensor | None) -> Tensor:
        """Transform `[B, H*W, dim]`."""
        before, after = _norms(self.pre_norm)
        y = before(self.norm1, x)
        query, key = self.self_attn.project(y + position, 0, 1).chunk(2, dim=-1)
        x = after(self.norm1, x + self.self_attn.attend(query, key, self.self_attn.project(y, 2, 2), visible))
        y = before(self.norm2, x)
        return after(self.norm2, x + self.linear2(self.linear1(y, relu=True)))


def _norms(pre_norm: bool) -> tuple[Callable[[nn.Module, Tensor], Tensor], Callable[[nn.Module, Tensor], Tensor]]:
    """Return the steps before and after a sublayer: its norm on one side, nothing on the other."""

    def norm(module: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = module(x)
        return out

    def nothing(_module: nn.Module, x: Tensor) -> Tensor:
        return x

    return (norm, nothing) if pre_norm else (nothing, norm)


class DecoderLayer(nn.Module):
    """Self-attention among the object queries, cross-attention to the encoder's output, a feed-forward network.

    Norms come after each addition or, with `pre_norm`, before each sublayer.
    """

    def __init__(self, dim: int, nheads: int, feedforward_dim: int, pre_norm: bool = False) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.self_attn = Attention(dim, nheads)
        self.multihead_attn = Attention(dim, nheads)
        self.linear1 = Linear(dim, feedforward_dim)
        self.linear2 = Linear(feedforward_dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(
        self, x: Tensor, object_queries: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, want_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Transform `[B, num_queries, dim]`, given this layer's projected keys and values of the memory."""
        before, after = _norms(self.pre_norm)
        y = before(self.norm1, x)
        query, own_key = self.self_attn.project(y + object_queries, 0, 1).chunk(2, dim=-1)
        x = after(self.norm1, x + self.self_attn.attend(query, own_key, self.self_attn.project(y, 2, 2)))
        query = self.multihead_attn.project(before(self.norm2, x) + object_queries, 0, 0)
        x = after(self.norm2, x + self.multihead_attn.attend(query, key, value, visible))
        weights = self.multihead_attn.weights(query, key, visible) if want_weights else None
        y = before(self.norm3, x)
        return after(self.norm3, x + self.linear2(self.linear1(y, relu=True))), weights


class Encoder(nn.Module):
    """The encoder's layers and, with `pre_norm`, the norm of their outputs."""

    def __init__(self, num_layers: int, dim: int, nheads: int, feedforward_dim: int, pre_norm: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(dim, nheads, feedforward_dim, pre_norm) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim) if pre_norm else None

    def forward(self, x: Tensor, position: Tensor, visible: Tensor | None = None) -> list[Tensor]:
        """Return each layer's normed output, `[B, H*W, dim]`. The last one is the memory that the decoder reads."""
        outputs = []
        for layer in self.layers:
            x = layer(x, position, visible)
            outputs.append(x if self.norm is None else self.norm(x))
        return outputs


class Decoder(nn.Module):
    """The decoder's layers, and the norm of their outputs, which the next layer does not see."""

    def __init__(self, num_layers: int, dim: int, nheads: int, feedforward_dim: int, pre_norm: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(dim, nheads, feedforward_dim, pre_norm) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim)

    def forward(
        self, object_queries: Tensor, memory: Tensor, position: Tensor, visible: Tensor | None, want_weights: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Decode the object queries.

        Args:
            object_queries: `[num_queries, dim]`, added to queries and keys in every layer.
            memory: The encoder's output, `[B, H*W, dim]`.
            position: The memory's position encoding.
            visible: `[B, 1, 1, H*W]`, False on padding, or None.
            want_weights: Whether to also return the weights of the cross-attention.

        Returns:
            For each layer, the normed output `[B, num_queries, dim]` and, if wanted, the weights
            `[B, num_queries, H*W]`.
        """
        # Every layer reads the same memory: one product gives the keys of all layers, another the values.
        cross = [cast(DecoderLayer, layer).multihead_attn for layer in self.layers]
        dim = memory.shape[-1]
        weights = torch.stack([attention.in_proj_weight[dim:] for attention in cross])  # [L, 2*dim, dim]
        biases = torch.stack([attention.in_proj_bias[dim:] for attention in cross])
        keys = linear(memory + position, weights[:, :dim].flatten(0, 1), biases[:, :dim].flatten())
        values = linear(memory, weights[:, dim:].flatten(0, 1), biases[:, dim:].flatten())

        x = torch.zeros_like(object_queries).expand(memory.shape[0], -1, -1)
        outputs, attention_weights = [], []
        for layer, key, value in zip(self.layers, keys.split(dim, -1), values.split(dim, -1), strict=True):
            x, attended = layer(x, object_queries, key, value, visible, want_weights)
            outputs.append(self.norm(x))
            if attended is not None:
                attention_weights.append(attended)
        return outputs, attention_weights


class Transformer(nn.Module):
    """The encoder and the decoder, named as in the official checkpoints."""

    def __init__(
        self,
        dim: int,
        nheads: int,
        encoder_layers: int,
        decoder_layers: int,
        feedforward_dim: int,
        pre_norm: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(encoder_layers, dim, nheads, feedforward_dim, pre_norm)
        self.decoder = Decoder(decoder_layers, dim, nheads, feedforward_dim, pre_norm)
