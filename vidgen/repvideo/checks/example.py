"""Examples of what RepVideo and CogVideoX do, at released sizes, for benchmarks and tests.

A step of training, one evaluation of the model, and the first steps of sampling a video.
``training_example(model)`` and the like draw random inputs; the example that they return is then
called with a model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vidgen.common.random_inputs import RandomInputs
from vidgen.common.random_weights import with_drawn_weights
from vidgen.ops import Ops

from ..model.config import PRESETS, CogVideoXConfig
from ..model.transformer import CogVideoXTransformer
from ..sampling.sampler import sample
from ..sampling.schedules import N_TRAIN, denoiser_table, sat_schedule, shifted_alphas
from ..training.loss import Noised, add_noise, draw_timesteps, training_step

SHIFT = 3.0  # of the released schedule of 2B
N_STEPS = 50


class Size(NamedTuple):
    """Latent frames, height and width; tokens of the text."""

    latents: tuple[int, int, int]
    text_length: int


SIZES = {
    "480p": Size((13, 60, 90), 226),  # 49 frames
    "480p_short": Size((3, 60, 90), 226),  # 9 frames
    "toy": Size((3, 4, 6), 10),
}


def example_config(
    model: str = "2b",
    n_heads: int | None = None,
    n_layers: int | None = None,
    *,
    gates: bool = True,
) -> CogVideoXConfig:
    """A released size, or one with fewer heads (of 64) and layers. Without gates: CogVideoX."""
    if model not in PRESETS:
        raise ValueError(f"model: expected {', '.join(PRESETS)}, got {model!r}")
    config = replace(PRESETS[model], gates=gates)
    if n_heads is not None:
        config = replace(config, num_attention_heads=n_heads)
    if n_layers is not None:
        config = replace(config, num_layers=n_layers)
    return config


def example_model(config: CogVideoXConfig, ops: Ops, **options: Any) -> CogVideoXTransformer:
    """With gradients; options: those of `with_drawn_weights`."""
    return with_drawn_weights(lambda: CogVideoXTransformer(config, ops), **options)


class TrainingExample(NamedTuple):
    """The inputs of a step of training."""

    noised: Noised
    text: Tensor

    def __call__(self, model: CogVideoXTransformer) -> Tensor:
        """The loss."""
        return training_step(model, self.noised, self.text).loss.mean()


class EvaluationExample(NamedTuple):
    """The inputs of the model in one step of sampling."""

    latents: Tensor
    text: Tensor
    timestep: Tensor

    def __call__(self, model: CogVideoXTransformer) -> Tensor:
        """The velocity ``[B, T, C, h, w]``."""
        return model(*self)


class VideoExample(NamedTuple):
    """The inputs of the first ``n_steps`` of a sampling run of `N_STEPS`."""

    noise: list[Tensor]  # in fp32 or wider: the starting noise, then what the steps draw
    text: Tensor
    n_steps: int

    def __call__(self, model: CogVideoXTransformer) -> Tensor:
        """Latents ``[1, T, C, h, w]``."""
        steps = sat_schedule(N_STEPS, SHIFT)[: self.n_steps]
        noise, uncond = iter(self.noise), torch.zeros_like(self.text)
        return sample(model, noise, self.text, uncond, steps, ops=model.ops)


def training_example(
    model: CogVideoXTransformer, *, size: str = "480p", rows: int = 1, seed: int = 0
) -> TrainingExample:
    """Inputs in the dtype and on the device of the model."""
    inputs = _Inputs(model, size, seed)
    table = denoiser_table(shifted_alphas(SHIFT)).to(inputs.device)
    timestep = draw_timesteps(rows, table, inputs.generator)
    noised = add_noise(inputs.latents(rows), inputs.latents(rows), timestep, table)
    return TrainingExample(noised, inputs.text(rows))


def evaluation_example(
    model: CogVideoXTransformer, *, size: str = "480p", rows: int = 2, seed: int = 0
) -> EvaluationExample:
    """Two rows: the two halves of guidance."""
    inputs = _Inputs(model, size, seed)
    timestep = torch.full((rows,), N_TRAIN // 2, device=inputs.device)
    return EvaluationExample(inputs.latents(rows), inputs.text(rows), timestep)


def video_example(
    model: CogVideoXTransformer, *, size: str = "480p", n_steps: int = N_STEPS, seed: int = 0
) -> VideoExample:
    inputs = _Inputs(model, size, seed)
    n_noises = 1 + sum(step.n_draws for step in sat_schedule(N_STEPS, SHIFT)[:n_steps])
    dtype = torch.promote_types(inputs.dtype, torch.float32)
    noise = [inputs.latents(1).to(dtype) for _ in range(n_noises)]
    return VideoExample(noise, inputs.text(1), n_steps)


class _Inputs(RandomInputs):
    def __init__(self, model: CogVideoXTransformer, size: str, seed: int) -> None:
        super().__init__(model, seed)
        self.size = SIZES[size]

    def latents(self, rows: int) -> Tensor:
        """``[rows, T, C, h, w]``"""
        n_frames, *sides = self.size.latents
        return self(rows, n_frames, self.config.in_channels, *sides)

    def text(self, rows: int) -> Tensor:
        """``[rows, S, text_embed_dim]``"""
        return self(rows, self.size.text_length, self.config.text_embed_dim)
