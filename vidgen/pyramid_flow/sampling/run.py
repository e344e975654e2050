"""What lasts while a video is made, and what the model is called with at every step of a stage."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vidgen.common.progress import Progress
from vidgen.ops import EAGER, Ops

from ..model.config import PATCH
from ..model.history import HistoryClip, count_units, unit_frames
from ..model.kv_cache import CacheSizes, KVCache, StageCache
from ..model.layers import Condition
from ..model.sequence import Packing
from ..model.transformer import EmbeddedText, PyramidTransformer
from ..text import Prompts, TextFeatures
from .config import SamplingConfig
from .noise import DrawnNoise, Noise


def cache_sizes(
    model: PyramidTransformer, text: Prompts, config: SamplingConfig, n_given: int = 0
) -> CacheSizes:
    """For a video of which the first ``n_given`` units are given."""
    n_prompts, text_length = text.prompt.features.shape[:2]
    height, width = config.frame_size(0)
    guided = any(config.guidance.is_active(unit) for unit in range(max(n_given, 1), config.n_units))
    return CacheSizes(
        n_blocks=model.n_blocks,
        n_rows=n_prompts * (2 if guided else 1),
        n_heads=model.config.num_attention_heads,
        head_dim=model.config.attention_head_dim,
        text_length=text_length,
        frame_tokens=height // PATCH * (width // PATCH),
        n_steps=config.steps,
        n_units=config.n_units,
        frames_per_unit=config.frames_per_unit,
        dtype=next(model.parameters()).dtype,
        n_given=n_given,
    )


def check_prompts(text: Prompts, config: SamplingConfig, n_given: int = 0) -> None:
    """ValueError unless these are enough to go on after ``n_given`` units."""
    prompt, negative = text
    if negative is None:
        if any(config.guidance.is_active(unit) for unit in range(n_given, config.n_units)):
            raise ValueError("text: expected negative prompts for guidance, got none")
        return
    for name, own, other in zip(TextFeatures._fields, prompt, negative, strict=True):
        if (own is None) != (other is None):
            raise ValueError(f"{name}: expected of both prompts or of neither, got one")
        if own is None or other is None:
            continue
        if other.shape[1:] != own.shape[1:] or len(other) not in (1, len(own)):
            expected = f"{list(own.shape)} as the prompts have, or one row"
            raise ValueError(f"negative {name}: expected {expected}, got {list(other.shape)}")


class Run:
    """What lasts while a video is made."""

    def __init__(
        self,
        model: PyramidTransformer,
        text: Prompts,
        config: SamplingConfig,
        noise: Noise | None,
        given: Tensor | None,
    ) -> None:
        parameter = next(model.parameters())
        self.model, self.text, self.config = model, text, config
        self.dtype, self.device = parameter.dtype, parameter.device
        self.latent_dtype = self.dtype
        if not config.round_official:
            self.latent_dtype = torch.promote_types(self.dtype, torch.float32)
        # Plain PyTorch rounds after each operation, as the released code does.
        self.ops: Ops = EAGER if config.round_official else model.ops
        self.noise = DrawnNoise(dtype=self.latent_dtype) if noise is None else noise
        self.n_prompts = len(text.prompt.features)
        self.n_given = self._check_given(given)
        check_prompts(text, config, self.n_given)
        sizes = cache_sizes(model, text, config, self.n_given)
        self.cache = KVCache(config.cache, sizes, self.device)
        if self.cache.estimate.stages and not model.config.use_temporal_causal:
            raise ValueError(
                "cache: expected a model with causal attention, got one whose frames see later ones"
            )

        scheduler = config.scheduler
        outer = self.n_prompts, model.config.latent_channels, config.n_frames
        self.history = [  # of all frames, at every level of the pyramid
            torch.empty(
                *outer, *config.frame_size(level), dtype=self.latent_dtype, device=self.device
            )
            for level in range(scheduler.stages)
        ]
        n_given_frames = 0 if given is None else given.shape[2]
        if given is not None:
            self._write(range(n_given_frames), self._on_device(given))
        self.noise_frames = self._lowest_noise((*outer, *config.size))
        self.n_given_frames = n_given_frames
        # {(stage, whether guided): {step: condition}}, the same for all units but the first
        self.conditions: dict[tuple[int, bool], dict[int, Condition]] = {}

    def start(self, unit: int) -> Tensor:
        """Noise of a unit at the lowest resolution."""
        frames = unit_frames(unit, self.config.frames_per_unit)
        first = frames.start - self.n_given_frames  # as the released code takes them
        return self.noise_frames[:, :, first : first + len(frames)]

    def jump(self, x: Tensor, unit: int, stage: int) -> Tensor:
        scheduler = self.config.scheduler
        shape = (*x.shape[:3], 2 * x.shape[3], 2 * x.shape[4])
        noise = {k: self._on_device(z) for k, z in self.noise.jump(unit, stage, shape).items()}
        alpha, beta = scheduler.renoise_coefficients(stage)
        return self.ops.upsample_renoise(x, alpha, beta, gamma=scheduler.gamma, **noise)

    def flow(self, x: Tensor, unit: int, stage: int, progress: Progress) -> tuple[Tensor, Tensor]:
        """Latents at the end of a stage, and the model's first velocity."""
        config = self.config
        n_steps = (config.steps if unit else config.first_steps)[stage]
        steps = config.scheduler.set_timesteps(n_steps, stage)
        is_guided, scale = config.guidance.is_active(unit), config.guidance.scale(unit)
        call = Call.of(self, unit, stage, is_guided)
        first = None
        pairs = list(zip(steps.timesteps.tolist(), steps.steps, strict=True))
        for i, (timestep, step) in enumerate(progress.track(pairs, "steps")):
            velocity = call(x, timestep, i)
            first = velocity if first is None else first
            uncond = None
            if is_guided:
                uncond, velocity = velocity.chunk(2)
            x = self.ops.euler_step(x, velocity, step, uncond=uncond, guidance=scale)
        assert first is not None
        return x, first

    def finish(self, unit: int, x: Tensor) -> None:
        """What is made becomes history."""
        self._write(unit_frames(unit, self.config.frames_per_unit), x)

    @cached_property
    def embedded(self) -> EmbeddedText:
        """Of the negative prompts, if there are any, and the prompts."""
        features, pooled = self._joined("features"), self._joined("pooled")
        return self.model.embed_text(self._as_weights(features), self._as_weights(pooled))

    @cached_property
    def text_mask(self) -> Tensor | None:
        mask = self._joined("mask")
        return None if mask is None else mask.to(self.device)

    def rows(self, is_guided: bool) -> slice:
        """Those of `embedded` that a forward pass needs."""
        return slice(None) if is_guided else slice(-self.n_prompts, None)

    def clip(self, clip: HistoryClip, first_frame: int) -> Tensor:
        """Latents of a clip of history from ``first_frame`` on."""
        start = max(clip.frames.start, first_frame)
        return self.history[clip.level][:, :, start : clip.frames.stop]

    def _joined(self, part: str) -> Any:
        """Negative prompts, then prompts."""
        own = getattr(self.text.prompt, part)
        if self.text.negative is None or own is None:
            return own
        negative = getattr(self.text.negative, part)
        return torch.cat([negative.expand(len(own), *negative.shape[1:]).to(own), own])

    def _write(self, frames: range, x: Tensor) -> None:
        for level in reversed(self.history):
            level[:, :, frames.start : frames.stop] = x
            x = self.ops.downsample(x) if level is not self.history[0] else x

    def _lowest_noise(self, shape: tuple[int, ...]) -> Tensor:
        x = self.noise.initial(shape)
        if x.shape != shape:
            raise ValueError(f"noise: expected {list(shape)}, got {list(x.shape)}")
        x = self._on_device(x)
        for _ in self.history[1:]:
            x = self.ops.downsample(x, noise=True)
        return x

    def _on_device(self, x: Tensor) -> Tensor:
        return x.to(self.device, self.latent_dtype)

    def _as_weights(self, x: Tensor) -> Tensor:
        return x.to(self.device, self.dtype)

    def _check_given(self, given: Tensor | None) -> int:
        """How many units are given."""
        if given is None:
            return 0
        config = self.config
        expected = self.n_prompts, self.model.config.latent_channels, *config.size
        if given.ndim != 5 or (*given.shape[:2], *given.shape[3:]) != expected:
            b, c, h, w = expected
            raise ValueError(f"given: expected [{b}, {c}, frames, {h}, {w}], got {[*given.shape]}")
        n_given = count_units(given.shape[2], config.frames_per_unit)
        if n_given >= config.n_units:
            raise ValueError(
                f"n_units: expected more than the {n_given} given, got {config.n_units}"
            )
        return n_given


@dataclass(frozen=True)
class Call:
    """What the model is called with at every step of a stage."""

    run: Run
    text: EmbeddedText
    packing: Packing
    clips: list[Tensor]  # of history, those in the cache left out
    cache: StageCache | None
    conditions: dict[int, Condition] | None  # by step, those of the units before

    @classmethod
    def of(cls, run: Run, unit: int, stage: int, is_guided: bool) -> Call:
        rows = run.rows(is_guided)
        text = EmbeddedText(*(x[rows] for x in run.embedded))
        mask = None if run.text_mask is None else run.text_mask[rows]
        cache = run.cache.stage(unit, stage, len(text.tokens))
        past_frames = 0 if cache is None else cache.past_frames
        packing = run.model.pack_call(
            run.config.column(unit, stage),
            text.tokens,
            mask,
            past_frames=past_frames,
            only_current=run.model.ops is not EAGER,  # the released code drops the rest later
        )
        clips = [
            cls._batch(run.clip(clip, past_frames), run, is_guided)
            for clip in run.config.clips(unit, stage)[:-1]
            if clip.frames.stop > past_frames
        ]
        keeps = unit > 0 and run.model.ops is not EAGER  # steps of the first unit are its own
        conditions = run.conditions.setdefault((stage, is_guided), {}) if keeps else None
        return cls(run, text, packing, clips, cache, conditions)

    def __call__(self, x: Tensor, timestep: float, step: int) -> Tensor:
        """The velocity ``[rows, C, t, h, w]``."""
        n_rows, model = len(self.text.tokens), self.run.model
        clips = [*self.clips, self._batch(x, self.run, n_rows > len(x))]
        time: Tensor | Condition = x.new_full((n_rows,), timestep)
        if self.conditions is not None:
            if step not in self.conditions:
                self.conditions[step] = model.condition(time, self.text)
            time = self.conditions[step]
        (velocity,) = model(
            [clips],
            time,
            self.text,
            packing=self.packing,
            caches=None if self.cache is None else self.cache.blocks(step),
        )
        return velocity

    @staticmethod
    def _batch(x: Tensor, run: Run, is_guided: bool) -> Tensor:
        """For each branch of guidance, in the model's dtype."""
        x = x.to(run.dtype)
        return torch.cat([x, x]) if is_guided else x
