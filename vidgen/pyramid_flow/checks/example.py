"""Examples for benchmarks, profiles and tests: models and inputs of released sizes, all random.

There is an example of a training step, of one evaluation while sampling, and of a whole video. Each
is called with a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vidgen.common.random_weights import draw_weights
from vidgen.ops import Ops

from ..model.config import FluxConfig, MMDiTConfig
from ..model.flux import PyramidFluxTransformer
from ..model.history import HistoryClip, history_layout, training_units, unit_frames
from ..model.kv_cache import OFF, CachePolicy, StageCache
from ..model.mmdit import PyramidDiffusionMMDiT
from ..model.positions import Column
from ..model.sequence import Packing, grids_of, pack_patches
from ..model.transformer import PyramidTransformer
from ..sampling.config import SamplingConfig
from ..sampling.noise import DrawnNoise
from ..sampling.sampler import sample
from ..sampling.scheduler import PyramidFlowScheduler
from ..text import TEXT_LENGTH, Prompts, TextFeatures
from ..training.loss import (
    ColumnDraws,
    TrainingColumn,
    TrainingConfig,
    draw,
    training_columns,
    training_step,
)

LATENTS = {"192p": (24, 40), "384p": (48, 80), "768p": (96, 160), "toy": (8, 16)}  # height, width


def example_config(
    model: str, n_heads: int | None = None, n_layers: int | None = None
) -> FluxConfig | MMDiTConfig:
    """The released ``flux`` or ``mmdit``, or with ``n_heads`` and ``n_layers`` of each kind."""
    if model not in ("flux", "mmdit"):
        raise ValueError(f"model: expected flux or mmdit, got {model!r}")
    config = FluxConfig() if model == "flux" else MMDiTConfig()
    if n_heads is not None:
        config = replace(config, num_attention_heads=n_heads)
    if n_layers is not None:
        config = replace(config, num_layers=n_layers)
        if isinstance(config, FluxConfig):
            config = replace(config, num_single_layers=n_layers)
    return config


def example_model(
    config: FluxConfig | MMDiTConfig,
    ops: Ops,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> PyramidTransformer:
    """A model with random weights everywhere, also where a fresh model has zeros."""
    build = PyramidFluxTransformer if isinstance(config, FluxConfig) else PyramidDiffusionMMDiT
    with torch.device(device):
        model = build(config, ops).to(dtype)  # type: ignore[arg-type]
    draw_weights(model, seed)
    return model


class TrainingExample(NamedTuple):
    """The inputs of one training step as released, with ratios 1, 2, 1."""

    latents: Tensor
    draws: list[ColumnDraws]
    units: list[int]
    text: TextFeatures

    def columns(self, ops: Ops) -> list[TrainingColumn]:
        training, scheduler = TrainingConfig(), PyramidFlowScheduler()
        return training_columns(self.latents, self.draws, training, scheduler, self.units, ops)

    def __call__(self, model: PyramidTransformer) -> Tensor:
        """The loss."""
        return training_step(model, self.columns(model.ops), self.text).loss


class SamplingExample(NamedTuple):
    """The inputs of one evaluation of a model while it makes a frame."""

    clips: list[Tensor]
    timestep: Tensor
    text: TextFeatures
    packing: Packing  # built once for many evaluations, as the sampler does

    def __call__(self, model: PyramidTransformer) -> Tensor:
        """The velocity ``[B, C, 1, h, w]``, from text features and all clips."""
        text = model.embed_text(self.text.features, self.text.pooled)
        return self._velocity(model, self.clips, text, self.packing)

    def as_sampled(
        self, model: PyramidTransformer, past_frames: int = 0
    ) -> Callable[[PyramidTransformer], Tensor]:
        """The same evaluation as `sampling.sampler` runs it, with its preparations made here.

        Text is embedded, the last block runs on the tokens of the clip being made only, and keys
        and values of the ``past_frames`` oldest frames, all of the first clip, are in a cache.
        """
        features, text_mask, pooled = self.text
        text, config = model.embed_text(features, pooled), model.config
        old, rest = self.clips[0][:, :, :past_frames], self.clips[0][:, :, past_frames:]
        (column,) = grids_of([self.clips], config.latent_channels)

        def pack(column: Column, past_frames: int) -> Packing:
            return model.pack_for_sampling(
                column, features, text_mask, past_frames=past_frames, only_current=True
            )

        packing, clips, cache = pack(column, past_frames), self.clips, None
        if past_frames:
            _, rows, cols = column[0]
            n_past = features.shape[1] + past_frames * rows * cols
            size = 2, model.n_blocks, len(features), config.num_attention_heads, n_past
            entry = features.new_zeros(*size, config.attention_head_dim)
            before = (past_frames, rows, cols), column[-1]
            filled = StageCache([entry], 0, n_past, 0)
            self._velocity(model, [old, self.clips[-1]], text, pack(before, 0), filled)
            cache = StageCache([entry], n_past, 0, past_frames)
            clips = [*([rest] if rest.shape[2] else []), *self.clips[1:]]
        return lambda model: self._velocity(model, clips, text, packing, cache)

    def _velocity(
        self,
        model: PyramidTransformer,
        clips: list[Tensor],
        text: tuple[Tensor, Tensor],  # from `PyramidTransformer.embed_text`
        packing: Packing,
        cache: StageCache | None = None,
    ) -> Tensor:
        text_tokens, pooled = text
        condition = model.condition(self.timestep, pooled)
        caches = None if cache is None else cache.blocks(0)
        velocity = model(pack_patches([clips]), text_tokens, condition, packing, caches)
        return packing.unpack(velocity)[0]


class VideoExample(NamedTuple):
    """The inputs of a whole video. Every stage of every unit has one step."""

    text: Prompts
    size: tuple[int, int]
    n_units: int

    def __call__(self, model: PyramidTransformer, *, cached: bool = False) -> Tensor:
        """The latents ``[1, C, T, h, w]``."""
        device = next(model.parameters()).device
        noise = DrawnNoise(torch.Generator(device).manual_seed(0))
        steps = (1,) * TrainingConfig().n_stages
        config = SamplingConfig(
            self.size,
            self.n_units,
            first_steps=steps,
            steps=steps,
            cache=CachePolicy() if cached else OFF,
        )
        return sample(model, self.text, config, noise=noise)


def training_example(
    model: PyramidTransformer,
    *,
    size: str = "384p",
    n_frames: int = 16,
    rows: int = 1,
    step: int = 1,
    rank: int = 0,
    seed: int = 0,
) -> TrainingExample:
    """A training step in the model's dtype and on its device."""
    config, normal = model.config, _Normal.like(model, seed)
    training = TrainingConfig()
    n_samples = rows * len(training.stages)
    latents = normal(n_samples, config.latent_channels, n_frames, *LATENTS[size])
    text = _text(config, n_samples, normal)
    units = training_units(
        training.n_stages, n_frames, step=step, rank=rank, sync_group=min(8, n_frames)
    )
    draws = draw(latents, training, units, normal.generator)
    return TrainingExample(latents, draws, units, text)


def sampling_example(
    model: PyramidTransformer,
    *,
    size: str = "384p",
    unit: int = 15,
    stage: int = 2,
    rows: int = 2,
    seed: int = 0,
) -> SamplingExample:
    """An evaluation at a stage of ``unit``, with its history. Guidance has two rows."""
    config, normal = model.config, _Normal.like(model, seed)
    clips = [*history_layout(unit, stage), HistoryClip(stage, unit_frames(unit))]
    top = TrainingConfig().n_stages - 1
    sizes = [[side // 2 ** (top - clip.level) for side in LATENTS[size]] for clip in clips]
    latents = [
        normal(rows, config.latent_channels, len(clip.frames), *sides)
        for clip, sides in zip(clips, sizes, strict=True)
    ]
    text = _text(config, rows, normal)
    timestep = torch.full_like(text.features[:, 0, 0], 500.0)
    packing = model.pack([latents], text.features, text.mask)
    return SamplingExample(latents, timestep, text, packing)


def video_example(
    model: PyramidTransformer, *, size: str = "384p", n_units: int = 16, seed: int = 0
) -> VideoExample:
    """A video from a prompt and a negative prompt, where every unit is one latent frame."""
    negative, prompt = (_text(model.config, 1, _Normal.like(model, seed + i)) for i in range(2))
    return VideoExample(Prompts(prompt, negative), LATENTS[size], n_units)


def example_step(model: PyramidTransformer, **example: Any) -> Callable[[], Tensor]:
    """A function that runs forward and backward on a `training_example`, and returns the loss.

    Gradients stay in the model until the next call.
    """
    loss_of = training_example(model, **example)

    def run() -> Tensor:
        model.zero_grad(set_to_none=True)
        loss = loss_of(model)
        loss.backward()
        return loss.detach()

    return run


@dataclass(frozen=True)
class _Normal:
    """Draws normal tensors from one generator."""

    generator: torch.Generator
    dtype: torch.dtype

    @classmethod
    def like(cls, model: PyramidTransformer, seed: int) -> _Normal:
        parameter = next(model.parameters())
        return cls(torch.Generator(parameter.device).manual_seed(seed), parameter.dtype)

    def __call__(self, *shape: int) -> Tensor:
        device = self.generator.device
        return torch.randn(shape, generator=self.generator, device=device, dtype=self.dtype)


def _text(config: FluxConfig | MMDiTConfig, n_samples: int, normal: _Normal) -> TextFeatures:
    """Features of prompts of several lengths."""
    device = normal.generator.device
    lengths = torch.arange(n_samples, device=device) * 37 % TEXT_LENGTH + 1
    return TextFeatures(
        normal(n_samples, TEXT_LENGTH, config.joint_attention_dim),
        (torch.arange(TEXT_LENGTH, device=device) < lengths[:, None]).long(),
        normal(n_samples, config.pooled_projection_dim),
    )
