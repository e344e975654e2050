"""The scaling and shift layer: a later frame's condition as a modulation of frame 0's features."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Mixer(nn.Module):
    """``A * (1 + a) + b`` with ``[a | b] = W2 W1 SiLU(E) + bias``, W1 of ``rank`` rows.

    A (the anchor) are the video encoder's features of frame 0, E those of a later frame.
    """

    def __init__(self, width: int, rank: int) -> None:
        """A ``rank`` below 0 means full rank: W2 alone."""
        super().__init__()
        self.lora = nn.Linear(width, rank, bias=False) if rank > 0 else None
        self.proj = nn.Linear(rank if rank > 0 else width, 2 * width)

    def forward(self, anchor: Tensor, features: Tensor) -> Tensor:
        """``anchor`` [B, 1, N, D] or as ``features`` [B, T, N, D]."""
        h = F.silu(features)
        h = h if self.lora is None else self.lora(h)
        scale, shift = self.proj(h).chunk(2, dim=-1)
        return anchor * (1 + scale) + shift
