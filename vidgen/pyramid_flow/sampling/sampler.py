"""From noise to the latents of a video: unit after unit, each through the stages of the pyramid.

    for each unit:                      the first is one latent frame, an image
        x = noise at the lowest resolution
        for each stage:
            x <- alpha nearest2(x) + beta block noise             but for the first stage
            x <- x + (sigma' - sigma) v(x, history, t, text)      for each step, with guidance
        x, and its lower resolutions, are history for the units that follow

Frames that are given (an image, a clip to go on from) are history from the start. Nothing is
computed twice that is the same: text is embedded once for a video, masks and positions once for a
stage, and keys and values of the past are kept where the cache says so.

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
from .run import Run, cache_sizes


class StageRecord(NamedTuple):
    """One stage of one unit, for who wants to look."""

    unit: int
    stage: int
    start: Tensor  # latents after the jump into the stage, [B, C, t, h, w]
    first_velocity: Tensor  # what the model said first; rows of the negative prompts come first
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
    """The normalised latents of videos, ``[B, C, T, h, w]``, given ones first.

    Args:
        model: its weights' dtype and device are those of the forward passes. Latents are fp32
            (fp64 for fp64) unless ``config.round_official``.
        text: of B prompts, with negative ones (B, or one for all) where guidance is not 1.
        noise: default `DrawnNoise` of PyTorch's global generator.
        given: normalised latents of the first frames, which fill units, ``[B, C, T0, h, w]``.
        progress: is told of units, stages and steps.
        on_unit: called with the latents of every unit that has been made.
        on_stage: called with the record of every stage.

    Raises:
        ValueError: shapes that do not fit, missing negative prompts, nothing left to make.
    """
    with torch.no_grad():
        run = Run(model, _prompts(text), config, noise, given)
        for unit in progress.track(range(run.n_given, config.n_units), "units"):
            x = run.start(unit)
            for stage in progress.track(range(config.scheduler.stages), "stages"):
                start = x = run.jump(x, unit, stage) if stage else x
                x, velocity = run.flow(x, unit, stage, progress)
                if on_stage is not None:
                    on_stage(StageRecord(unit, stage, start, velocity, x))
            run.finish(unit, x)
            if on_unit is not None:
                on_unit(x)
        return run.history[-1]


def estimate_cache(
    model: PyramidTransformer,
    text: Prompts | TextFeatures,
    config: SamplingConfig,
    n_given: int = 0,
) -> CacheEstimate:
    """Bytes that `sample` will take for keys and values, before it takes them.

    ``n_given``: how many units are given.
    """
    return plan(config.cache, cache_sizes(model, _prompts(text), config, n_given))


def _prompts(text: Prompts | TextFeatures) -> Prompts:
    return text if isinstance(text, Prompts) else Prompts(text, None)
