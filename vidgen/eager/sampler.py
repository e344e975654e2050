"""Guidance and sampler steps in plain expressions."""

import math

import torch
from torch import Tensor

from vidgen_kernels.latents.sampler import LinearStep


def euler_step(
    x: Tensor,
    velocity: Tensor,
    step: float,
    *,
    uncond: Tensor | None = None,
    guidance: float = 1.0,
) -> Tensor:
    v = _guided(velocity, uncond, guidance)
    return (x.to(torch.promote_types(x.dtype, torch.float32)) + step * v).to(x.dtype)


def ddim_step(
    x: Tensor,
    velocity: Tensor,
    sqrt_alpha: float,
    sqrt_alpha_next: float,
    *,
    denoiser_sqrt_alpha: float | None = None,
    uncond: Tensor | None = None,
    guidance: float = 1.0,
) -> Tensor:
    v = _guided(velocity, uncond, guidance)
    x0 = _clean_prediction(x, v, sqrt_alpha if denoiser_sqrt_alpha is None else denoiser_sqrt_alpha)
    k = ((1 - sqrt_alpha_next**2) / (1 - sqrt_alpha**2)) ** 0.5
    return (k * x + (sqrt_alpha_next - sqrt_alpha * k) * x0).to(x.dtype)


def dpm_step(
    x: Tensor,
    velocity: Tensor,
    sqrt_alpha: float,
    sqrt_alpha_next: float,
    *,
    noise: Tensor | None = None,
    previous: Tensor | None = None,
    sqrt_alpha_previous: float | None = None,
    denoiser_sqrt_alpha: float | None = None,
    uncond: Tensor | None = None,
    guidance: float = 1.0,
) -> tuple[Tensor, Tensor]:
    v = _guided(velocity, uncond, guidance)
    x0 = _clean_prediction(x, v, sqrt_alpha if denoiser_sqrt_alpha is None else denoiser_sqrt_alpha)
    if sqrt_alpha_next == 1:
        return x0.to(x.dtype), x0
    h = _log_snr(sqrt_alpha_next) - _log_snr(sqrt_alpha)
    estimate = x0
    if previous is not None and sqrt_alpha_previous is not None:
        r = (_log_snr(sqrt_alpha) - _log_snr(sqrt_alpha_previous)) / h
        estimate = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * previous
    k = ((1 - sqrt_alpha_next**2) / (1 - sqrt_alpha**2)) ** 0.5
    from_x0 = math.expm1(-2 * h) * sqrt_alpha_next
    from_noise = (1 - sqrt_alpha_next**2) ** 0.5 * (1 - math.exp(-2 * h)) ** 0.5
    out = k * math.exp(-h) * x - from_x0 * estimate + from_noise * noise
    return out.to(x.dtype), x0


def linear_step(
    x: Tensor,
    velocity: Tensor,
    step: LinearStep,
    *,
    uncond: Tensor | None = None,
    guidance: float = 1.0,
    previous: Tensor | None = None,
    noise: Tensor | None = None,
    is_update: bool = False,
    return_x0: bool = False,
) -> tuple[Tensor, Tensor]:
    v = _guided(velocity, uncond, guidance)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    out = step.c_x * wide + step.c_v * v
    if previous is not None:
        out = out + step.c_p * previous
    if noise is not None:
        out = out + step.c_z * noise
    x0 = step.a_x * wide + step.a_v * v if return_x0 else wide.new_empty(0)
    return out.to(x.dtype), x0


def _guided(velocity: Tensor, uncond: Tensor | None, guidance: float) -> Tensor:
    return velocity if uncond is None else uncond + guidance * (velocity - uncond)


def _clean_prediction(x: Tensor, v: Tensor, sqrt_alpha: float) -> Tensor:
    """x0, in fp32 or wider, as the official loops keep their latents."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return sqrt_alpha * x - (1 - sqrt_alpha**2) ** 0.5 * v


def _log_snr(sqrt_alpha: float) -> float:
    """Half the log signal-to-noise ratio: log(A / sqrt(1 - A^2))."""
    return math.log(sqrt_alpha / (1 - sqrt_alpha**2) ** 0.5) if sqrt_alpha else -math.inf
