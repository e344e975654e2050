"""Arguments that are documented as numbers: a tensor's gradient would be lost, NaN would spread."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import vidgen_kernels as vk

X = torch.ones(1, 4, 8)
LATENTS = torch.ones(1, 2, 1, 4, 4)
STREAM = vk.QKVStream(torch.ones(1, 4, 24))
POSITIONS = torch.ones(4, 1)

NUMBERS: dict[str, tuple[Callable[[Any], Any], float]] = {
    "residual_norm eps": (lambda n: vk.residual_norm(X, eps=n), 0.5),
    "post_norm_residual eps": (lambda n: vk.post_norm_residual(X, X, eps=n), 0.5),
    "post_norm_adaln eps": (lambda n: vk.post_norm_adaln(X, X, scale=X, shift=X, eps=n), 0.5),
    "post_norm_adaln next_eps": (
        lambda n: vk.post_norm_adaln(X, X, scale=X, shift=X, next_eps=n),
        0.5,
    ),
    "qk_norm_rope eps": (lambda n: vk.qk_norm_rope(STREAM, n_heads=1, eps=n), 0.5),
    "qk_norm_rope theta": (
        lambda n: vk.qk_norm_rope(STREAM, POSITIONS, (8,), n_heads=1, theta=n),
        10.0,
    ),
    "euler_step step": (lambda n: vk.euler_step(X, X, n), 0.5),
    "euler_step guidance": (lambda n: vk.euler_step(X, X, 0.5, uncond=X, guidance=n), 5.0),
    "ddim_step sqrt_alpha": (lambda n: vk.ddim_step(X, X, n, 0.7), 0.5),
    "ddim_step sqrt_alpha_next": (lambda n: vk.ddim_step(X, X, 0.5, n), 0.5),
    "dpm_step sqrt_alpha": (lambda n: vk.dpm_step(X, X, n, 0.7, noise=X), 0.5),
    "dpm_step denoiser_sqrt_alpha": (
        lambda n: vk.dpm_step(X, X, 0.5, 0.7, noise=X, denoiser_sqrt_alpha=n),
        0.5,
    ),
    "upsample_renoise alpha": (lambda n: vk.upsample_renoise(LATENTS, n, 0.5, seed=0), 0.5),
    "upsample_renoise beta": (lambda n: vk.upsample_renoise(LATENTS, 0.5, n, seed=0), 0.5),
    "block_noise gamma": (lambda n: vk.block_noise(LATENTS.shape, gamma=n, seed=0), 0.25),
    "renoise_coefficients sigma": (vk.renoise_coefficients, 0.5),
}
every_number = pytest.mark.parametrize("name", NUMBERS)


@every_number
@pytest.mark.parametrize("bad", [nn.Parameter(torch.tensor(0.25)), "0.25", float("nan")])
def test_what_is_no_number_is_refused(name: str, bad: Any) -> None:
    call, _ = NUMBERS[name]
    with pytest.raises(ValueError, match=f"{name.split()[1]}: expected a (finite )?number"):
        call(bad)


@every_number
def test_numbers_of_numpy_are_numbers(name: str) -> None:
    call, good = NUMBERS[name]
    results = call(np.float64(good)), call(good)
    for a, b in zip(*(y if isinstance(y, tuple) else (y,) for y in results), strict=True):
        assert torch.equal(*(torch.as_tensor(y, dtype=torch.float64) for y in (a, b)))
