"""Blocks that two models share, with the names of their checkpoints.

Shapes: B batch, C channels, T frames, D width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class GELUProjection(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        # numbered as in the checkpoints, where 1 was dropout
        layers = (GELUProjection(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))
        self.net = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class FrameAttention(nn.Module):
    """Self-attention within each frame: one head of full width."""

    def __init__(self, channels: int, group_norm: nn.Module) -> None:
        super().__init__()
        self.group_norm = group_norm
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).permute(0, 2, 3, 4, 1).flatten(2, 3)  # [B, T, H * W, C]
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        y = self.to_out[0](F.scaled_dot_product_attention(q, k, v))
        return x + y.unflatten(2, x.shape[3:]).permute(0, 4, 1, 2, 3)
