"""Noise levels of sampling, as in the two codebases that run CogVideoX and RepVideo.

With ``abar`` the cumulative product of 1 - beta, CogVideoX shifts the signal-to-noise ratio,
``abar <- abar / (s + (1 - s) abar)``, and makes the last level pure noise (2305.08891):

    A = sqrt(abar),  A <- (A - A_last) A_first / (A_first - A_last)

- `sat_schedule`: *SAT*, in which RepVideo is released, first selects the timesteps of the run and
  then rescales their levels, in fp32, so that the last *selected* one is pure noise. The denoiser
  replaces A by the nearest entry of its own table of all timesteps.
- `diffusers_schedule`: *diffusers* rescales the levels of all timesteps once, in fp64, and steps to
  the level of ``t - 1000 // n``, whatever the next timestep is.

The two differ by up to 1e-3 in A at 50 steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

N_TRAIN = 1000  # timesteps
LINEAR_START, LINEAR_END = 0.00085, 0.012  # of beta, whose square root is linear

SAMPLERS = ("dpm", "ddim")
# options of diffusers' schedulers, with the only value that we support
FIXED = {"prediction_type": "v_prediction"}


class Step(NamedTuple):
    """One step from noise level A to A+, where A = sqrt(alpha_bar)."""

    timestep: int  # the model's input
    sqrt_alpha: float  # A
    sqrt_alpha_next: float  # A+
    denoiser_sqrt_alpha: float  # A as the denoiser rounds it, for computing x0
    sqrt_alpha_previous: float | None = None  # second-order steps: A of the step before
    n_draws: int = 0  # normal tensors that the released code draws; it uses only the last one
    is_stochastic: bool = False  # SDE-DPM-Solver++ 2M, else DDIM


class SATTables(NamedTuple):
    """The levels of a run of n steps."""

    timesteps: Tensor  # int64 [n], descending from N_TRAIN - 1
    sqrt_alphas: Tensor  # fp32 [n + 1], from 0 to 1
    denoiser_sqrt_alphas: Tensor  # fp32 [n], entries of the denoiser's table


def shifted_alphas(
    shift: float, n_train: int = N_TRAIN, start: float = LINEAR_START, end: float = LINEAR_END
) -> Tensor:
    """alpha_bar with the signal-to-noise ratio shifted, fp64 ``[n_train]``, descending."""
    if not 0 < shift < float("inf"):
        raise ValueError(f"shift: expected a positive number, got {shift}")
    betas = torch.linspace(start**0.5, end**0.5, n_train, dtype=torch.float64).square()
    alphas = (1 - betas).cumprod(dim=0)
    return alphas / (shift + (1 - shift) * alphas)


def rescale(alphas: Tensor) -> Tensor:
    """sqrt(alpha_bar) ``[n]``, rescaled so that the last one is 0 and the first one stays."""
    roots = alphas.sqrt()
    first, last = roots[0], roots[-1]
    return (roots - last) * (first / (first - last))


def denoiser_table(alphas: Tensor) -> Tensor:
    """sqrt(alpha_bar) of all timesteps for SAT's denoiser, fp32, index = timestep."""
    return rescale(alphas.float())


def sat_tables(n_steps: int, alphas: Tensor) -> SATTables:
    """The levels of a run of ``n_steps``, given `shifted_alphas`."""
    _check_steps(n_steps, len(alphas))
    last = len(alphas) - 1
    # computed as numpy.linspace does, whose rounding decides where the number is whole
    timesteps = torch.tensor([int(k * (-last / n_steps) + last) for k in range(n_steps)])
    roots = rescale(alphas.float()[timesteps.flip(0)]).flip(0)
    if n_steps == 1:
        roots = torch.zeros(1)
    table = denoiser_table(alphas)
    nearest = (roots[:, None] - table).abs().argmin(dim=1)
    return SATTables(timesteps, torch.cat([roots, roots.new_ones(1)]), table[nearest])


def sat_schedule(n_steps: int, shift: float = 3.0, sampler: str = "dpm") -> list[Step]:
    """The steps of SAT's `VPSDEDPMPP2MSampler` ("dpm") or `VideoDDIMSampler` ("ddim").

    Args:
        shift: 3 for CogVideoX-2B and RepVideo, 1 for the larger models.

    Raises:
        ValueError: numbers out of range.
    """
    _check_sampler(sampler)
    tables = sat_tables(n_steps, shifted_alphas(shift))
    levels = tables.sqrt_alphas.double().tolist()
    rows = zip(
        tables.timesteps.tolist(),
        pairwise(levels),
        tables.denoiser_sqrt_alphas.double().tolist(),
        strict=True,
    )
    steps = [Step(t, now, then, denoiser) for t, (now, then), denoiser in rows]
    if sampler == "ddim":
        return steps
    *others, last = _looking_back(steps, set(range(1, n_steps - 1)))
    return [*others, last._replace(n_draws=0)]


def diffusers_schedule(n_steps: int, scheduler: Any) -> list[Step]:
    """The steps of a `CogVideoXDDIMScheduler` or `CogVideoXDPMScheduler` of diffusers.

    Raises:
        ValueError: number of steps out of range, a scheduler of another type or prediction.
    """
    sampler = _sampler_of(type(scheduler).__name__)
    config: Mapping[str, Any] = scheduler.config
    for name, expected in FIXED.items():
        if config[name] != expected:
            raise ValueError(f"{name}: expected {expected!r}, got {config[name]!r}")
    _check_steps(n_steps, config["num_train_timesteps"])
    scheduler.set_timesteps(n_steps)
    roots = scheduler.alphas_cumprod.double().sqrt().tolist()
    final = float(scheduler.final_alpha_cumprod) ** 0.5
    stride = config["num_train_timesteps"] // n_steps
    steps = [
        Step(t, roots[t], roots[t - stride] if t >= stride else final, roots[t])
        for t in scheduler.timesteps.tolist()
    ]
    if sampler == "ddim":
        return steps
    inner = {i for i, step in enumerate(steps) if i > 0 and step.timestep >= stride}
    return _looking_back(steps, inner)


def build_scheduler(config: Mapping[str, Any], sampler: str | None = None) -> Any:
    """diffusers' scheduler of a scheduler_config.json; ``sampler`` replaces the one it names.

    Raises:
        ValueError: another class of scheduler.
    """
    import diffusers

    sampler = sampler or _sampler_of(config.get("_class_name", "nothing"))
    _check_sampler(sampler)
    kind: Any = getattr(diffusers, f"CogVideoX{sampler.upper()}Scheduler")
    return kind.from_config(dict(config))


def _looking_back(steps: list[Step], inner: set[int]) -> list[Step]:
    """The steps of SDE-DPM-Solver++ 2M; those at indices ``inner`` also use the previous x0."""
    first_order = [step._replace(n_draws=1, is_stochastic=True) for step in steps]
    return [
        step._replace(n_draws=2, sqrt_alpha_previous=steps[i - 1].sqrt_alpha)
        if i in inner
        else step
        for i, step in enumerate(first_order)
    ]


def _sampler_of(name: str) -> str:
    for sampler in SAMPLERS:
        if name == f"CogVideoX{sampler.upper()}Scheduler":
            return sampler
    expected = "CogVideoXDPMScheduler or CogVideoXDDIMScheduler"
    raise ValueError(f"scheduler: expected {expected}, got {name}")


def _check_sampler(sampler: str) -> None:
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler: expected {' or '.join(SAMPLERS)}, got {sampler!r}")


def _check_steps(n_steps: int, n_train: int) -> None:
    if not 1 <= n_steps <= n_train:
        raise ValueError(f"n_steps: expected 1 to {n_train}, got {n_steps}")
