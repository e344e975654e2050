"""The sampling loop: from noise to latents, with classifier-free guidance.

Both halves of guidance run as one batch, the unconditional half first. The released code of
RepVideo applies guidance to x0, diffusers to v. The result is the same, since
``x0 = a x - sqrt(1 - a^2) v`` is linear in v. Guidance and the step are one operator
(`Ops.ddim_step`, `Ops.dpm_step`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vidgen.common.finite import FiniteSteps
from vidgen.common.progress import SILENT, Progress
from vidgen.ops import EAGER, Ops

from .schedules import Step

# (latents [B, T, C, h, w], text [B, S, W], timestep [B]) -> v [B, T, C, h, w]
Model = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Guidance:
    """The weight w of each step: ``v = v_uncond + w (v - v_uncond)``.

    With an exponent w is dynamic: ``w = 1 + scale (1 - cos(pi ((n - t) / n)^exponent)) / 2`` for n
    steps. As in the released code and in diffusers, t is the timestep, 0 to 999, not the index of
    the step, so w jumps between 1 and 1 + scale.
    """

    scale: float = 6.0
    exponent: float | None = 5.0  # None: w = scale

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"guidance: expected a finite number, got {self.scale}")
        # the base of the power may be negative
        if self.exponent is not None and (self.exponent <= 0 or self.exponent % 1):
            raise ValueError(f"exponent: expected a whole number above 0, got {self.exponent}")

    @property
    def is_none(self) -> bool:
        """Whether all weights are 1."""
        return self.scale == (1 if self.exponent is None else 0)

    def weights(self, timesteps: Sequence[int]) -> list[float]:
        if self.exponent is None:
            return [self.scale] * len(timesteps)
        n = len(timesteps)
        angles = [math.pi * ((n - t) / n) ** int(self.exponent) for t in timesteps]
        return [1 + self.scale * (1 - math.cos(angle)) / 2 for angle in angles]


def draw_normal(
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Endless normal tensors, drawn on the generator's device: the same for every ``device``."""
    source = generator.device if generator is not None else device
    while True:
        x = torch.randn(tuple(shape), generator=generator, dtype=dtype, device=source)
        yield x.to(device)


@torch.no_grad()
def sample(
    model: Model,
    noise: Iterator[Tensor],
    text: Tensor,
    uncond: Tensor | None,
    steps: Sequence[Step],
    *,
    guidance: Guidance | None = None,
    ops: Ops = EAGER,
    progress: Progress = SILENT,
) -> Tensor:
    """Latents ``[B, T, C, h, w]`` in the dtype of the noise.

    Args:
        model: is given the latents in the dtype of the text.
        noise: normal tensors ``[B, T, C, h, w]``. Sampling starts from the first one; the steps
            take the others in the order and number in which the released code draws them. They are
            fp32 as in SAT, or have the dtype of the text as in diffusers, which rounds to it after
            every step.
        text, uncond: conditional and unconditional features ``[B, S, W]``; without uncond there is
            no guidance. A step of weight 1 runs the model on the conditional half only.
        steps: from `sat_schedule` or `diffusers_schedule`.
        guidance: default ``Guidance()`` if there is an uncond.

    Raises:
        ValueError: guidance without uncond, or an uncond of another shape than the text.
    """
    _check(text, uncond, guidance)
    latents = next(noise)
    weights = [1.0] * len(steps)
    if uncond is not None:
        weights = (guidance or Guidance()).weights([step.timestep for step in steps])
    x0, both = None, None if uncond is None else torch.cat([uncond, text])
    finite = FiniteSteps("latents")
    pairs = progress.track(list(zip(steps, weights, strict=True)), "denoising steps")
    for i, (step, weight) in enumerate(pairs):
        guided = None if weight == 1 else both
        velocity, velocity_uncond = _predict(model, latents, text, guided, step)
        options = {
            "denoiser_sqrt_alpha": step.denoiser_sqrt_alpha,
            "uncond": velocity_uncond,
            "guidance": weight,
        }
        levels = step.sqrt_alpha, step.sqrt_alpha_next
        if not step.is_stochastic:
            latents = ops.ddim_step(latents, velocity, *levels, **options)
            finite.note(f"denoising step {i + 1} of {len(steps)}", latents)
            continue
        z = None
        for _ in range(step.n_draws):
            z = next(noise)
        if step.sqrt_alpha_previous is not None:
            options |= {"previous": x0, "sqrt_alpha_previous": step.sqrt_alpha_previous}
        latents, x0 = ops.dpm_step(latents, velocity, *levels, noise=z, **options)
        finite.note(f"denoising step {i + 1} of {len(steps)}", latents)
    finite.check()
    return latents


def _predict(
    model: Model, latents: Tensor, text: Tensor, both: Tensor | None, step: Step
) -> tuple[Tensor, Tensor | None]:
    """The conditional velocity; given ``both`` halves of the text, also the unconditional one."""
    x = latents.to(text.dtype)
    context = text
    if both is not None:
        x, context = torch.cat([x, x]), both
    timestep = torch.full((len(x),), step.timestep, device=x.device)
    velocity = model(x, context, timestep)
    if both is None:
        return velocity, None
    velocity_uncond, velocity = velocity.chunk(2)
    return velocity, velocity_uncond


def _check(text: Tensor, uncond: Tensor | None, guidance: Guidance | None) -> None:
    if uncond is None:
        if guidance is not None:
            raise ValueError("uncond: expected a tensor for guidance, got None")
    elif uncond.shape != text.shape:
        raise ValueError(
            f"uncond: expected shape {list(text.shape)} as text has, got {list(uncond.shape)}"
        )
