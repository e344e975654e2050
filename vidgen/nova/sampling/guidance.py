"""Guidance of NOVA's denoising steps, as in the released code.

Branches are stacked on the batch, the conditional one first. c is the prediction with the prompt, u
with the negative prompt. The renormalised prediction is ``renorm(e) = e clamp(|c| / |e|, r, 1)``.

    two branches         renorm(u + s (c - u))
    image guidance       renorm(u + s (c - i)) + g (i - u)     i: negative prompt with the frames; u
                                                               sees no frames then
    spatiotemporal       renorm(u + s (c - u)) + t (c - p)     p: the perturbed branch, which the
                                                               released code runs unperturbed

Norms are over all tokens of a sample. For tokens outside the current set the prediction is the
latent itself, in every branch.
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

    guidance_scale: float = 5.0  # s; 1 or less: no guidance, only the conditional branch
    min_guidance_scale: float | None = None  # s grows linearly from it over the sets of a frame
    guidance_trunc: float = 0.0  # no guidance once the timestep is below this
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
        """Whether there are two branches without renorm, which a sampler step combines itself."""
        return self.n_branches == 2 and self.guidance_renorm == 1

    @property
    def has_one_scale(self) -> bool:
        """Whether all sets have the same scale, with one branch or with `is_plain` guidance."""
        return (self.is_plain or self.n_branches == 1) and self.min_guidance_scale is None

    @property
    def hides_frames(self) -> bool:
        """Whether the second branch has `bos_token` in place of the frames (image guidance)."""
        return self.n_branches == 3 and bool(self.image_guidance_scale)

    def scale(self, step: int, n_steps: int) -> float:
        """The scale s of set ``step``, counted from 0, of the ``n_steps`` sets of a frame."""
        if self.min_guidance_scale is None:
            return self.guidance_scale
        rise = self.guidance_scale - self.min_guidance_scale
        return self.min_guidance_scale + rise * (step + 1) / n_steps

    def n_guided(self, timesteps: list[float]) -> int:
        """The number of diffusion steps with guidance: those before the truncation."""
        if self.n_branches == 1:
            return 0
        return next((k for k, t in enumerate(timesteps) if t < self.guidance_trunc), len(timesteps))

    def combine(
        self, predictions: Tensor, scale: float, rest: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The guided prediction ``[B, n, P]`` of all branches ``[G B, n, P]``, and of ``rest``.

        Args:
            rest: the latent ``[B, m, P]`` outside the set, for the norms of `guidance_renorm`;
                None where ``predictions`` are for all tokens.
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
