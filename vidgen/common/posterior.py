"""What the video VAEs share: the check of input shapes, and the distribution of latents."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def check_volume(name: str, x: Tensor, n_channels: int) -> None:
    """Raises ValueError unless ``x`` is a video or latents, ``[B, C, T, H, W]`` and not empty."""
    if x.ndim != 5 or x.shape[1] != n_channels or 0 in x.shape[2:]:
        shape = f"[B, {n_channels}, frames, height, width], none of them 0"
        raise ValueError(f"{name}: expected {shape}, got {list(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point dtype, got {x.dtype}")


@dataclass(frozen=True)
class Posterior:
    """The diagonal Gaussian over the latents of a video."""

    moments: Tensor  # [B, 2 C, T, h, w]: mean, logarithm of the variance

    @property
    def mean(self) -> Tensor:
        return self.moments.chunk(2, dim=1)[0]

    @property
    def logvar(self) -> Tensor:
        return self.moments.chunk(2, dim=1)[1].clamp(-30.0, 20.0)

    def mode(self) -> Tensor:
        """The most probable latents [B, C, T, h, w]."""
        return self.mean

    def sample(
        self, generator: torch.Generator | None = None, *, noise: Tensor | None = None
    ) -> Tensor:
        """Random latents [B, C, T, h, w], from ``noise`` of that shape if given, else drawn."""
        mean = self.mean
        if noise is None:
            # drawn on the generator's device: a CPU generator gives the same latents everywhere
            device = mean.device if generator is None else generator.device
            noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=device)
        elif noise.shape != mean.shape:
            raise ValueError(f"noise: expected {list(mean.shape)}, got {list(noise.shape)}")
        return mean + torch.exp(0.5 * self.logvar) * noise.to(mean)

    def kl(self) -> Tensor:
        """Divergence from the standard normal [B], summed over a video's latents."""
        mean, logvar = self.mean, self.logvar
        return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).flatten(1).sum(dim=1)
