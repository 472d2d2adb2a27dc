"""The position encodings that DETR adds to queries and keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

TEMPERATURE = 10000.0
EPSILON = 1e-6


class SinePositionEncoding(nn.Module):
    """The fixed two-dimensional encoding of DETR, normalised to the unpadded area of each image. It has no parameters.

    Args:
        hidden_dim: The transformer's width; each axis takes half of it.
    """

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        self.hidden_dim = hidden_dim

    def forward(self, feature_map: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Return the encoding of every position.

        Args:
            feature_map: `[B, C, H, W]`; only its size, device and dtype matter.
            padding_mask: `[B, H, W]`, True on padding, or None if nothing is padded.

        Returns:
            `[B, H*W, hidden_dim]` with a mask, else `[1, H*W, hidden_dim]`; computed in at least float32.
        """
        height, width = feature_map.shape[-2:]
        dtype = torch.promote_types(feature_map.dtype, torch.float32)
        device = feature_map.device
        if padding_mask is None:  # all rows are alike, and all columns
            y = self._encode(torch.arange(1, height + 1, dtype=dtype, device=device)[None, :, None], 1)
            x = self._encode(torch.arange(1, width + 1, dtype=dtype, device=device)[None, None, :], 2)
            y, x = y.expand(-1, -1, width, -1), x.expand(-1, height, -1, -1)
        else:
            y, x = (self._encode((~padding_mask).cumsum(axis, dtype=dtype), axis) for axis in (1, 2))
        return torch.cat([y, x], dim=3).flatten(1, 2).to(feature_map.dtype)  # [B, H*W, hidden_dim]

    def _encode(self, numbers: Tensor, axis: int) -> Tensor:
        """Encode the numbers of rows (axis 1) or columns (axis 2), `[B, H, W]`, from 1: `[B, H, W, hidden_dim/2]`."""
        relative = numbers / (numbers.select(axis, -1).unsqueeze(axis) + EPSILON) * (2 * math.pi)
        steps = torch.arange(0, self.hidden_dim // 2, 2, dtype=numbers.dtype, device=numbers.device)
        angle = relative[..., None] / TEMPERATURE ** (steps / (self.hidden_dim // 2))  # [B, H, W, hidden_dim/4]
        return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(3)


class LearnedPositionEncoding(nn.Module):
    """A learned encoding of each row and each column, independent of padding.

    Args:
        hidden_dim: The transformer's width; each axis takes half of it.
        reach: The number of rows, and of columns, that have an encoding.
    """

    def __init__(self, hidden_dim: int, reach: int) -> None:
        super().__init__()
        self.row_embed = nn.Embedding(reach, hidden_dim // 2)
        self.col_embed = nn.Embedding(reach, hidden_dim // 2)

    def forward(self, feature_map: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Return `[1, H*W, hidden_dim]` for a feature map `[B, C, H, W]`: the column's half first, then the row's."""
        height, width = feature_map.shape[-2:]
        x = self.col_embed.weight[None, :width].expand(height, -1, -1)
        y = self.row_embed.weight[:height, None].expand(-1, width, -1)
        return torch.cat([x, y], dim=2).flatten(0, 1)[None].to(feature_map.dtype)  # [H, W, d] -> [1, H*W, d]
