"""Where a sampler's random numbers come from: white noise of a video, and noise for each jump.

The order is that of the released code: first all frames at once, at full size, then each jump as it
comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Noise(Protocol):
    """Where a sampler gets its random numbers."""

    def initial(self, shape: Sequence[int]) -> Tensor:
        """White noise of all frames at full size, ``[B, C, T, h, w]``."""
        ...

    def jump(self, unit: int, stage: int, shape: Sequence[int]) -> dict[str, Any]:
        """Noise for the jump into a stage, as an argument of ``upsample_renoise``."""
        ...


class DrawnNoise:
    """Noise from one generator, which draws where it lives: on a CPU the same for every device."""

    def __init__(
        self, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        self.generator, self.dtype = generator, dtype

    def initial(self, shape: Sequence[int]) -> Tensor:
        device = "cpu" if self.generator is None else self.generator.device
        return torch.randn(tuple(shape), generator=self.generator, dtype=self.dtype, device=device)

    def jump(self, unit: int, stage: int, shape: Sequence[int]) -> dict[str, Any]:
        return {"noise": self.initial(shape)}
