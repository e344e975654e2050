"""Guidance between the branches of a NOVA denoising step.

Branches are stacked on the batch, the conditional one first. With c, u and i the predictions with
the prompt, with the negative prompt and, for image guidance, with the negative prompt but the real
frames (u then sees no frames):

    e = u + s (c - u)                      then e <- e clamp(|c| / |e|, r, 1)
    e = u + s (c - i)                      the same, then e <- e + g (i - u)
    e = u + s (c - u) + t (c - p)          p, the perturbed branch, is the conditional one again

As the released code does. Norms are of all tokens of a sample, those outside the current set
included, whose "prediction" is the latent itself in every branch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Guidance:
    """Options by the names of the released pipeline.

    Raises:
        ValueError: numbers out of range, image and spatiotemporal guidance together.
    """

    guidance_scale: float = 5.0  # s; at most 1: the conditional branch alone
    min_guidance_scale: float | None = None  # s grows linearly from here over the sets of a frame
    guidance_trunc: float = 0.0  # no guidance at timesteps below
    guidance_renorm: float = 1.0  # r
    image_guidance_scale: float = 0.0  # g
    spatiotemporal_guidance_scale: float = 0.0  # t

    def __post_init__(self) -> None:
        for field in fields(self):
            x = getattr(self, field.name)
            if x is not None and not math.isfinite(x):
                raise ValueError(f"{field.name}: expected a finite number, got {x}")
        if not 0 < self.guidance_renorm <= 1:
            expected = "expected above 0, at most 1"
            raise ValueError(f"guidance_renorm: {expected}, got {self.guidance_renorm}")
        if self.image_guidance_scale and self.spatiotemporal_guidance_scale:
            raise ValueError(
                "image_guidance_scale, spatiotemporal_guidance_scale: expected one of them, "
                f"got {self.image_guidance_scale} and {self.spatiotemporal_guidance_scale}"
            )

    @property
    def n_branches(self) -> int:
        if self.guidance_scale <= 1:
            return 1
        return 3 if self.image_guidance_scale or self.spatiotemporal_guidance_scale else 2

    @property
    def is_plain(self) -> bool:
        """Whether two branches are combined linearly: a sampler step does that by itself."""
        return self.n_branches == 2 and self.guidance_renorm == 1

    @property
    def has_one_scale(self) -> bool:
        """Whether all sets have one, and branches are combined linearly if there are several."""
        return (self.is_plain or self.n_branches == 1) and self.min_guidance_scale is None

    @property
    def hides_frames(self) -> bool:
        """Whether the second branch sees `bos_token` in place of every frame."""
        return self.n_branches == 3 and bool(self.image_guidance_scale)

    def scale(self, step: int, n_steps: int) -> float:
        """At the set ``step``, counted from 0, of ``n_steps`` that are not empty."""
        if self.min_guidance_scale is None:
            return self.guidance_scale
        rise = self.guidance_scale - self.min_guidance_scale
        return self.min_guidance_scale + rise * (step + 1) / n_steps

    def n_guided(self, timesteps: list[float]) -> int:
        """How many diffusion steps come before the truncation, which is never taken back."""
        if self.n_branches == 1:
            return 0
        return next((k for k, t in enumerate(timesteps) if t < self.guidance_trunc), len(timesteps))

    def combine(
        self, predictions: Tensor, scale: float, rest: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The guided prediction ``[B, n, P]`` of stacked ``[G B, n, P]``, and that of the rest.

        Args:
            rest: the latent ``[B, m, P]`` outside the set, for the norms of `guidance_renorm`;
                None where ``predictions`` are of all tokens.
        """
        branches = predictions.chunk(self.n_branches)
        if self.n_branches == 1:
            return predictions, rest
        c, u = branches[:2]
        e = u + scale * (c - (branches[2] if self.hides_frames else u))
        if self.guidance_renorm < 1:
            ratio = _norm(c, rest) / _norm(e, rest)
            ratio = ratio.clamp(self.guidance_renorm, 1).to(e.dtype)
            e = e * ratio
            rest = None if rest is None else rest * ratio
        if self.hides_frames:
            e = e + self.image_guidance_scale * (branches[2] - u)
        elif self.n_branches == 3:
            e = e + self.spatiotemporal_guidance_scale * (c - branches[2])
        return e, rest


def _norm(x: Tensor, rest: Tensor | None) -> Tensor:
    """``[B, 1, 1]`` in fp32 or wider."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    squares = x.to(dtype).square().sum((1, 2), keepdim=True)
    if rest is not None:
        squares = squares + rest.to(dtype).square().sum((1, 2), keepdim=True)
    return squares.sqrt()
