"""Where each feature is: the sine encoding that DETR adds to queries and keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

TEMPERATURE = 10000.0
EPSILON = 1e-6


class SinePositionEncoding(nn.Module):
    """The fixed two-dimensional encoding of DETR, normalised to the valid area of each image.

    It has no parameters. What it returns for images without padding depends on their size alone and is kept.

    Args:
        hidden_dim: The transformer's width; each axis takes half of it.
    """

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        self.hidden_dim = hidden_dim
        self._cache: dict[tuple[int, int, torch.device, torch.dtype], Tensor] = {}

    def forward(self, feature_map: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Return the encoding of every position.

        Args:
            feature_map: `[B, C, H, W]`; its size, device and dtype are what matters.
            padding_mask: `[B, H, W]`, True on padding, or None where nothing is padded.

        Returns:
            `[B, H*W, hidden_dim]` with a mask, else `[1, H*W, hidden_dim]`; built in float32 at the least.
        """
        height, width = feature_map.shape[-2:]
        dtype = torch.promote_types(feature_map.dtype, torch.float32)
        if padding_mask is not None:
            return self._encode(~padding_mask, dtype).to(feature_map.dtype)
        if torch.compiler.is_compiling():  # a lookup by size would make the compiler start again for each size
            return self._plain(feature_map, dtype)
        key = (height, width, feature_map.device, feature_map.dtype)
        if key not in self._cache:
            # A tensor born in inference mode could never take part in training again.
            with torch.inference_mode(False), torch.no_grad():
                self._cache[key] = self._plain(feature_map, dtype)
        return self._cache[key]

    def _plain(self, feature_map: Tensor, dtype: torch.dtype) -> Tensor:
        valid = torch.ones(1, *feature_map.shape[-2:], dtype=torch.bool, device=feature_map.device)
        return self._encode(valid, dtype).to(feature_map.dtype)

    def _encode(self, valid: Tensor, dtype: torch.dtype) -> Tensor:
        y = valid.cumsum(1, dtype=dtype)
        x = valid.cumsum(2, dtype=dtype)
        y = y / (y[:, -1:, :] + EPSILON) * (2 * math.pi)
        x = x / (x[:, :, -1:] + EPSILON) * (2 * math.pi)
        exponent = torch.arange(0, self.hidden_dim // 2, 2, dtype=dtype, device=valid.device) / (self.hidden_dim // 2)
        period = TEMPERATURE**exponent
        axes = []
        for axis in (y, x):
            angle = axis[..., None] / period  # [B, H, W, hidden_dim/4]
            axes.append(torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(3))
        return torch.cat(axes, dim=3).flatten(1, 2)  # [B, H*W, hidden_dim]
