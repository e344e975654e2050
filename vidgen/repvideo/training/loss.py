"""RepVideo's training loss: the mean square error of the predicted velocity.

With A = sqrt(alpha_bar) at the timestep and v the prediction:

    x_t = A x_0 + sqrt(1 - A^2) noise
    target = A noise - sqrt(1 - A^2) x_0
    loss = mean((v - target)^2)

The released code computes the same as mean((x_0' - x_0)^2) / (1 - A^2), the error of the predicted
clean latents x_0' = A x_t - sqrt(1 - A^2) v.

Shapes: latents, noise, v [B, T, C, h, w]; timestep and loss [B].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..model.transformer import CogVideoXTransformer


class Noised(NamedTuple):
    """The model's inputs, and what it should predict."""

    latents: Tensor
    target: Tensor
    timestep: Tensor


class TrainingResult(NamedTuple):
    loss: Tensor  # in fp32 or wider
    velocity: Tensor


def draw_timesteps(n: int, table: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """n timesteps, uniform over those of ``table``, on its device."""
    return torch.randint(len(table), (n,), generator=generator, device=table.device)


def add_noise(latents: Tensor, noise: Tensor, timestep: Tensor, table: Tensor) -> Noised:
    """Noisy latents and the velocity to predict.

    Args:
        timestep: integers.
        table: A of every timestep, fp32 or fp64, such as `schedules.denoiser_table`.

    Raises:
        ValueError: shapes that do not fit.
    """
    if noise.shape != latents.shape:
        expected, actual = list(latents.shape), list(noise.shape)
        raise ValueError(f"noise: expected shape {expected} as latents have, got {actual}")
    if timestep.shape != latents.shape[:1]:
        raise ValueError(f"timestep: expected shape [{len(latents)}], got {list(timestep.shape)}")
    signal = table[timestep][:, None, None, None, None]
    sigma = (1 - signal**2).sqrt()
    signal, sigma = signal.to(latents), sigma.to(latents)
    return Noised(signal * latents + sigma * noise, signal * noise - sigma * latents, timestep)


def training_step(model: CogVideoXTransformer, noised: Noised, text: Tensor) -> TrainingResult:
    """One forward pass and the loss of each sample; ``text`` [B, S, text_embed_dim]."""
    velocity = model(noised.latents, text, noised.timestep)
    dtype = torch.promote_types(velocity.dtype, torch.float32)
    error = velocity.to(dtype) - noised.target.to(dtype)
    return TrainingResult(error.square().flatten(1).mean(dim=1), velocity)


def drop_text(text: Tensor, drop: Tensor) -> Tensor:
    """The text, with zeros where ``drop`` ``[B]`` is true: the unconditional input of guidance."""
    return text.masked_fill(drop[:, None, None], 0)
