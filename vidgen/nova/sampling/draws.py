"""The random numbers of a sampling run, in the order in which the released pipeline draws them.

First the order in which the tokens of a frame are generated; each sample has its own, which all of
its frames and all branches of guidance share. Then, for every set of every frame, the noise of a
whole latent, and, for schedules that add noise, the noise of every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Draws(Protocol):
    def order(self, n_tokens: int) -> Tensor:
        """The tokens of a frame in the order in which they are generated, int64 ``[B, N]``."""
        ...

    def start(self) -> Tensor:
        """The starting noise of the next set, ``[B, C, h, w]``."""
        ...

    def during(self, n_steps: int) -> Tensor:
        """The noise of the steps that add noise, ``[n_steps, B, C, h, w]``."""
        ...


class RandomDraws:
    """Draws on the device of the generator; results are in ``dtype`` on ``device``."""

    def __init__(
        self,
        shape: Sequence[int],  # [B, C, h, w]
        generator: torch.Generator | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.shape, self.generator = tuple(shape), generator
        self.dtype, self.device = dtype, device

    @property
    def _source(self) -> torch.device:
        return self.device if self.generator is None else self.generator.device

    def order(self, n_tokens: int) -> Tensor:
        size = self.shape[0], n_tokens
        uniform = torch.rand(size, generator=self.generator, device=self._source)
        return uniform.argsort(dim=1).to(self.device)

    def start(self) -> Tensor:
        return self._normal(*self.shape)

    def during(self, n_steps: int) -> Tensor:
        return self._normal(n_steps, *self.shape)

    def _normal(self, *size: int) -> Tensor:
        noise = torch.randn(size, generator=self.generator, device=self._source, dtype=self.dtype)
        return noise.to(self.device)
