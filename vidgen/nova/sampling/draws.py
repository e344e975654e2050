"""The random numbers of a run, in the order in which the released pipeline draws them.

First the order in which the tokens of a frame are made: each sample has its own, all its frames and
all branches of guidance share it. Then for every set of every frame the noise of a whole latent,
and for a schedule that adds noise that of every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Draws(Protocol):
    def order(self, n_tokens: int) -> Tensor:
        """Tokens of a frame as they are made, int64 ``[B, N]``."""
        ...

    def start(self) -> Tensor:
        """Noise that the next set starts from, ``[B, C, h, w]``."""
        ...

    def during(self, n_steps: int) -> Tensor:
        """Noise of the steps that add some, ``[n_steps, B, C, h, w]``."""
        ...


class RandomDraws:
    """From a generator, on whichever device that is; results are in ``dtype`` on ``device``."""

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
