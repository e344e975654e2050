"""Pyramid Flow's loss: flow matching in all stages of the pyramid at once.

Stage s takes latents of size H / 2^(K-1-s) from a noisy, blurred start to a sharper end. Start and
end have the same noise, so that the path is a straight line of constant velocity, start - end:

    start = start_s * noise_s + (1 - start_s) * up(clean_{s-1})       stage 0: noise
    end   = end_s * noise_s + (1 - end_s) * clean_s                   last stage: clean
    input = r * start + (1 - r) * end,   target = start - end,   r uniform in (0, 1]

A step packs one *column* of samples for each entry of `TrainingConfig.stages`. Columns differ in
size and length. A column shortens its videos to its own number of units (`training_units`) and
trains the last of them. The frames before are history, in a pyramid of resolutions, with a little
noise so that the model learns to tolerate its own errors. With `full_sequence` there is no history
and all frames are trained at once.

`objective` calls it for `vidgen train`; `training_columns` and `training_step` are a whole step.
Pyramidal Flow Matching (arXiv 2410.05954), section 3.

Shapes: N samples, where sample b of column c is ``b * columns + c``; B = N / columns samples of a
column; K stages; latents [N, C, T, H, W], normalised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vidgen.ops import Ops

from ..model.history import HistoryClip, history_layout, unit_frames
from ..model.transformer import PyramidTransformer
from ..sampling.scheduler import PyramidFlowScheduler
from ..text import TextFeatures


@dataclass(frozen=True)
class TrainingConfig:
    sample_ratios: tuple[int, ...] = (1, 2, 1)  # columns per stage, the lowest resolution first
    corrupt_ratio: float = 1 / 3  # upper bound of the noise in the history
    frames_per_unit: int = 1
    full_sequence: bool = False

    @property
    def n_stages(self) -> int:
        return len(self.sample_ratios)

    @property
    def stages(self) -> list[int]:
        """The stage of each column."""
        return [s for s, ratio in enumerate(self.sample_ratios) for _ in range(ratio)]


class ColumnDraws(NamedTuple):
    """All random numbers of a column."""

    noise: Tensor  # [B, C, T, H, W] normal, at full size
    time: Tensor  # [B] uniform in 0..1, the place in the stage
    corruption: Tensor  # [B] uniform in 0..1, times `corrupt_ratio`
    history_noise: list[Tensor]  # normal, of the shapes of the history's clips, newest first


class TrainingColumn(NamedTuple):
    """The model's inputs and target in one column."""

    clips: list[Tensor]  # [B, C, t, h, w], oldest first; the last one is trained
    target: Tensor  # velocity of the last clip
    timestep: Tensor  # [B], 0 to 1000
    sigma: Tensor  # [B], r in the formula


class TrainingResult(NamedTuple):
    loss: Tensor
    predictions: list[Tensor]  # velocities, per column


def draw(
    latents: Tensor, config: TrainingConfig, units: Sequence[int], seed: int | torch.Generator
) -> list[ColumnDraws]:
    """The random numbers of a step, from a seed or a generator on the latents' device."""
    if isinstance(seed, int):
        seed = torch.Generator(latents.device).manual_seed(seed)
    columns = zip(config.stages, _by_column(latents, config), strict=True)
    return [draw_column(rows, stage, units[stage], config, seed) for stage, rows in columns]


def draw_column(
    latents: Tensor,  # [B, C, T, H, W]
    stage: int,
    n_units: int,
    config: TrainingConfig,
    generator: torch.Generator,
) -> ColumnDraws:
    """The random numbers of one column; of the latents only size, dtype and device matter."""
    n_rows, n_channels, n_frames, height, width = latents.shape

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=latents.device, dtype=latents.dtype)

    def uniform() -> Tensor:
        return torch.rand(n_rows, generator=generator, device=latents.device)

    noise, time, corruption, history = normal(*latents.shape), uniform(), uniform(), []
    if not config.full_sequence:
        layout = history_layout(
            _last_unit(n_units, n_frames, config), stage, config.frames_per_unit
        )
        for level, frames in reversed(layout):
            shrink = 2 ** (config.n_stages - 1 - level)
            size = height // shrink, width // shrink
            history.append(normal(n_rows, n_channels, len(frames), *size))
    return ColumnDraws(noise, time, corruption, history)


def training_columns(
    latents: Tensor,
    draws: Sequence[ColumnDraws],
    config: TrainingConfig,
    scheduler: PyramidFlowScheduler,
    units: Sequence[int],
    ops: Ops,
) -> list[TrainingColumn]:
    """The inputs and targets of a step, a column for each of ``config.stages``.

    Args:
        units: how many units of the video each stage trains on (`history.training_units`). More
            than there are means all. Frames that fill no unit are left out. Not read for the full
            sequence.

    Raises:
        ValueError: samples that are no multiple of the columns.
    """
    columns = zip(config.stages, _by_column(latents, config), draws, strict=True)
    return [
        training_column(rows, drawn, stage, units[stage], config, scheduler, ops)
        for stage, rows, drawn in columns
    ]


def training_column(
    latents: Tensor,  # [B, C, T, H, W]
    drawn: ColumnDraws,
    stage: int,
    n_units: int,
    config: TrainingConfig,
    scheduler: PyramidFlowScheduler,
    ops: Ops,
) -> TrainingColumn:
    """One column. A step may pack columns of images and videos of any sizes."""
    clean = _pyramid(latents, config.n_stages, ops)
    noise = _pyramid(drawn.noise, config.n_stages, ops, noise=True)
    history: list[Tensor] = []
    frames = slice(None)
    if not config.full_sequence:
        unit = _last_unit(n_units, latents.shape[2], config)
        trained = unit_frames(unit, config.frames_per_unit)
        frames = slice(trained.start, trained.stop)
        layout = history_layout(unit, stage, config.frames_per_unit)
        level = (drawn.corruption * config.corrupt_ratio).to(latents)[:, None, None, None, None]
        for clip, clip_noise in zip(layout, reversed(drawn.history_noise), strict=True):
            x = clean[clip.level][:, :, clip.frames.start : clip.frames.stop]
            history.append(level * clip_noise + (1 - level) * x)
    timestep, sigma = _time(scheduler, stage, drawn.time)
    pair = ops.training_pair(
        clean[stage][:, :, frames],
        noise[stage][:, :, frames],
        scheduler.start_sigmas[stage],
        scheduler.end_sigmas[stage],
        sigma.to(latents.dtype),
    )
    clips = [*history, pair.input]
    return TrainingColumn(clips, pair.target, timestep.to(latents.dtype), sigma)


def training_step(
    model: PyramidTransformer,
    columns: Sequence[TrainingColumn],
    text: TextFeatures,
    *,
    full_sequence: bool = False,
) -> TrainingResult:
    """One packed forward pass and the loss, the mean over samples of the mean squared error.

    Args:
        text: of the samples, in their order.
        full_sequence: every frame sees all frames.
    """
    timestep = torch.stack([column.timestep for column in columns], dim=1).flatten()
    predictions = model.predict(
        [column.clips for column in columns],
        timestep,
        *text,
        causal=False if full_sequence else None,
    )
    errors = []
    for prediction, column in zip(predictions, columns, strict=True):
        dtype = torch.promote_types(prediction.dtype, torch.float32)
        error = prediction.to(dtype) - column.target.to(dtype)
        errors.append(error.square().flatten(1).mean(dim=1))
    return TrainingResult(torch.cat(errors).mean(), predictions)


def drop_prompts(text: TextFeatures, empty: TextFeatures, drop: Tensor) -> TextFeatures:
    """The features of an empty prompt (one row) where ``drop`` ``[N]`` is true.

    The released models were trained with one prompt in ten dropped.
    """
    for name, x, own in (
        ("text", empty.features, text.features),
        ("pooled", empty.pooled, text.pooled),
    ):
        if x.shape[1:] != own.shape[1:]:
            expected, got = list(own.shape[1:]), list(x.shape[1:])
            raise ValueError(f"empty {name}: expected {expected} in a row, got {got}")
    mask = None
    if text.mask is not None or empty.mask is not None:
        mask = torch.where(drop[:, None], _text_mask(empty), _text_mask(text))
    features = torch.where(drop[:, None, None], empty.features, text.features)
    return TextFeatures(features, mask, torch.where(drop[:, None], empty.pooled, text.pooled))


def _text_mask(text: TextFeatures) -> Tensor:
    """``[N, S]``, ones where there is no mask."""
    if text.mask is not None:
        return text.mask
    features = text.features
    return torch.ones(features.shape[:2], dtype=torch.long, device=features.device)


def column_tokens(height: int, width: int, stage: int, n_units: int, config: TrainingConfig) -> int:
    """Video tokens of a sample of latent ``height`` x ``width`` in a column, for `balance`."""
    made = unit_frames(n_units - 1, config.frames_per_unit)
    clips = [HistoryClip(stage, range(made.stop))]
    if not config.full_sequence:
        history = history_layout(n_units - 1, stage, config.frames_per_unit)
        clips = [*history, HistoryClip(stage, made)]
    sides = [2 * 2 ** (config.n_stages - 1 - clip.level) for clip in clips]
    return sum(
        len(clip.frames) * (height // side) * (width // side)
        for clip, side in zip(clips, sides, strict=True)
    )


def balance(token_counts: Sequence[int], n_bins: int) -> list[list[int]]:
    """Divides samples into ``n_bins`` shares with about equally many tokens (Patch n' Pack).

    Images, short and long videos of all stages may be mixed. Each share is one packed sequence of
    columns with one row.

    Returns:
        The indices of the samples in each share, largest first.

    Raises:
        ValueError: less than one share.
    """
    if n_bins < 1:
        raise ValueError(f"n_bins: expected at least 1, got {n_bins}")
    shares: list[list[int]] = [[] for _ in range(n_bins)]
    totals = [0] * n_bins
    for i in sorted(range(len(token_counts)), key=lambda i: (-token_counts[i], i)):
        smallest = min(range(n_bins), key=lambda j: (totals[j], j))
        shares[smallest].append(i)
        totals[smallest] += token_counts[i]
    return shares


def _pyramid(x: Tensor, n_levels: int, ops: Ops, noise: bool = False) -> list[Tensor]:
    """The levels of ``x``, lowest resolution first. With ``noise`` they keep its variance."""
    levels = [x]
    for _ in range(n_levels - 1):
        levels.insert(0, ops.downsample(levels[0], noise=noise))
    return levels


def _time(scheduler: PyramidFlowScheduler, stage: int, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Timestep and sigma of a stage, on its grid of training steps."""
    timesteps = torch.as_tensor(scheduler.timesteps_per_stage[stage], device=uniform.device)
    sigmas = torch.as_tensor(scheduler.sigmas_per_stage[stage], device=uniform.device)
    index = (uniform * len(timesteps)).long().clamp(max=len(timesteps) - 1)
    return timesteps[index], sigmas[index]


def _last_unit(n_units: int, n_frames: int, config: TrainingConfig) -> int:
    return min(n_units, 1 + (n_frames - 1) // config.frames_per_unit) - 1


def _by_column(latents: Tensor, config: TrainingConfig) -> list[Tensor]:
    """The samples of each column."""
    n_columns = len(config.stages)
    if len(latents) % n_columns:
        raise ValueError(f"latents: expected a multiple of {n_columns} samples, got {len(latents)}")
    return [latents[c::n_columns] for c in range(n_columns)]
