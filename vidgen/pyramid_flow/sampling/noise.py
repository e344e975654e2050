"""The random numbers of the sampler: white noise for a video, and noise for each jump.

The order is that of the released code: first the noise of all frames at full size, then that of
each jump when it is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Noise(Protocol):
    """The source of a sampler's random numbers."""

    def initial(self, shape: Sequence[int]) -> Tensor:
        """White noise for all frames at full size, ``[B, C, T, h, w]``."""
        ...

    def jump(self, unit: int, stage: int, shape: Sequence[int]) -> dict[str, Any]:
        """Noise for the jump into a stage, as a keyword argument of `Ops.upsample_renoise`."""
        ...


class DrawnNoise:
    """Noise from one generator, drawn on its own device; default: the global one of the CPU.

    So a generator on the CPU gives the same noise on every device.
    """

    def __init__(
        self, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        self.generator, self.dtype = generator, dtype

    def initial(self, shape: Sequence[int]) -> Tensor:
        device = "cpu" if self.generator is None else self.generator.device
        return torch.randn(tuple(shape), generator=self.generator, dtype=self.dtype, device=device)

    def jump(self, unit: int, stage: int, shape: Sequence[int]) -> dict[str, Any]:
        return {"noise": self.initial(shape)}
