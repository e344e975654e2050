"""From noise to the latents of a video, one unit after another, each through all stages.

    for each unit:                      the first is one latent frame, an image
        x = noise at the lowest resolution
        for each stage:
            x <- alpha nearest2(x) + beta block noise             except in the first stage
            x <- x + (sigma' - sigma) v(x, history, t, text)      for each step, with guidance
        x, and its lower resolutions, are history for the units that follow

Frames that are given (an image, or a clip to continue) are history from the start. Text is embedded
once for a video, masks and positions are built once for a stage, and keys and values of the past
are kept where the cache allows it. The pipeline and the benchmarks call `sample`.

Pyramidal Flow Matching (arXiv 2410.05954), section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vidgen.common.progress import SILENT, Progress

from ..model.kv_cache import CacheEstimate, plan
from ..model.transformer import PyramidTransformer
from ..text import Prompts, TextFeatures
from .config import SamplingConfig
from .noise import Noise
from .state import SamplerState, cache_sizes
from .velocity import StageVelocity


class StageRecord(NamedTuple):
    """One stage of one unit, as `sample` reports it."""

    unit: int
    stage: int
    start: Tensor  # latents after the jump into the stage, [B, C, t, h, w]
    first_velocity: Tensor  # the model's first output; with guidance, negative prompts come first
    end: Tensor


def sample(
    model: PyramidTransformer,
    text: Prompts | TextFeatures,
    config: SamplingConfig,
    *,
    noise: Noise | None = None,
    given: Tensor | None = None,
    progress: Progress = SILENT,
    on_unit: Callable[[Tensor], None] | None = None,
    on_stage: Callable[[StageRecord], None] | None = None,
) -> Tensor:
    """The normalised latents of videos, ``[B, C, T, h, w]``, including given ones.

    Args:
        model: forward passes run in the dtype and on the device of its weights. Latents are fp32
            (fp64 for fp64) unless ``config.round_official``.
        text: of B prompts. Where guidance is not 1, with negative prompts (B, or one for all).
        noise: default `DrawnNoise` from PyTorch's global generator.
        given: normalised latents of the first frames, whole units, ``[B, C, T0, h, w]``.
        progress: is told of units, stages and steps.
        on_unit: called with the latents of every unit that has been made.
        on_stage: called with the record of every stage.

    Raises:
        ValueError: shapes that do not fit, missing negative prompts, nothing left to make; latents
            that are no longer finite, with the step that made them so.
    """
    with torch.no_grad():
        state = SamplerState(model, _prompts(text), config, noise, given)
        for unit in progress.track(range(state.n_given, config.n_units), "units"):
            x = state.start(unit)
            for stage in progress.track(range(config.scheduler.stages), "stages"):
                start = x = state.jump(x, unit, stage) if stage else x
                x, velocity = integrate(state, x, unit, stage, progress)
                if on_stage is not None:
                    on_stage(StageRecord(unit, stage, start, velocity, x))
            state.finish(unit, x)
            if on_unit is not None:
                state.finite.check()
                on_unit(x)
        state.finite.check()
        return state.history[-1]


def integrate(
    state: SamplerState, x: Tensor, unit: int, stage: int, progress: Progress
) -> tuple[Tensor, Tensor]:
    """The Euler steps of a stage: latents at its end, and the model's first velocity."""
    config = state.config
    n_steps = (config.steps if unit else config.first_steps)[stage]
    steps = config.scheduler.set_timesteps(n_steps, stage)
    scale, model_velocity = config.guidance.scale(unit), StageVelocity(state, unit, stage)
    first = None
    pairs = list(zip(steps.timesteps.tolist(), steps.steps, strict=True))
    for i, (timestep, step) in enumerate(progress.track(pairs, "steps")):
        velocity, uncond = model_velocity(x, timestep, i), None
        first = velocity if first is None else first
        if model_velocity.is_guided:
            uncond, velocity = velocity.chunk(2)
        x = state.ops.euler_step(x, velocity, step, uncond=uncond, guidance=scale)
        state.finite.note(f"step {i + 1} of stage {stage + 1} of unit {unit + 1}", x)
    assert first is not None
    return x, first


def estimate_cache(
    model: PyramidTransformer,
    text: Prompts | TextFeatures,
    config: SamplingConfig,
    n_given: int = 0,
) -> CacheEstimate:
    """The bytes of keys and values that `sample` will allocate, for a video as it is asked for.

    ``n_given``: how many units are given.
    """
    return plan(config.cache, cache_sizes(model, _prompts(text), config, n_given))


def _prompts(text: Prompts | TextFeatures) -> Prompts:
    return text if isinstance(text, Prompts) else Prompts(text, None)
