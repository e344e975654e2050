"""The state of the sampler while a video is made: text, history, noise, caches.

`sampler.sample` makes one and drives it; `velocity` reads it.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vidgen.common.finite import FiniteSteps
from vidgen.ops import EAGER, Ops

from ..model.config import PATCH
from ..model.history import HistoryClip, count_units, unit_frames
from ..model.kv_cache import CacheSizes, KVCache
from ..model.layers import Condition
from ..model.transformer import PyramidTransformer
from ..text import Prompts, TextFeatures
from .config import SamplingConfig
from .noise import DrawnNoise, Noise


def cache_sizes(
    model: PyramidTransformer, text: Prompts, config: SamplingConfig, n_given: int = 0
) -> CacheSizes:
    """The sizes for a video whose first ``n_given`` units are given."""
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
    """Raises ValueError unless the units after the first ``n_given`` can be made from ``text``."""
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


class SamplerState:
    """What is kept from unit to unit.

    Raises:
        ValueError: as `sampler.sample` does, before any random number is drawn.
    """

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
        self.finite = FiniteSteps("latents")
        self.n_prompts = len(text.prompt.features)
        self.n_given = self._check_given(given)
        check_prompts(text, config, self.n_given)
        sizes = cache_sizes(model, text, config, self.n_given)
        self.cache = KVCache(config.cache, sizes, self.device)
        if self.cache.estimate.stages and not model.config.use_temporal_causal:
            raise ValueError(
                "cache: expected a model with causal attention, got one whose frames see later ones"
            )

        outer = self.n_prompts, model.config.latent_channels, config.n_frames
        self.history = [  # all frames, at every level of the pyramid
            torch.empty(
                *outer, *config.frame_size(level), dtype=self.latent_dtype, device=self.device
            )
            for level in range(config.scheduler.stages)
        ]
        self.n_given_frames = 0
        if given is not None:
            self.n_given_frames = given.shape[2]
            self._write(range(self.n_given_frames), self._on_device(given))
        self.lowest_noise = self._lowest_noise((*outer, *config.size))
        # {(stage, whether guided): {step: condition}}, the same for all units but the first
        self.conditions: dict[tuple[int, bool], dict[int, Condition]] = {}

    @cached_property
    def embedded_text(self) -> tuple[Tensor, Tensor]:
        """Tokens and pooled text of the negative prompts, if there are any, then of the prompts."""
        features, pooled = self._joined("features"), self._joined("pooled")
        return self.model.embed_text(self._as_weights(features), self._as_weights(pooled))

    @cached_property
    def text_mask(self) -> Tensor | None:
        mask = self._joined("mask")
        return None if mask is None else mask.to(self.device)

    def rows(self, is_guided: bool) -> slice:
        """The rows of the text that a forward pass needs: all, or those of the prompts."""
        return slice(None) if is_guided else slice(-self.n_prompts, None)

    def clip(self, clip: HistoryClip, first_frame: int) -> Tensor:
        """Latents of a clip of history, without the frames before ``first_frame``."""
        start = max(clip.frames.start, first_frame)
        return self.history[clip.level][:, :, start : clip.frames.stop]

    def start(self, unit: int) -> Tensor:
        """The noise at the lowest resolution from which a unit is made."""
        frames = unit_frames(unit, self.config.frames_per_unit)
        first = frames.start - self.n_given_frames  # the released code uses the first noise first
        return self.lowest_noise[:, :, first : first + len(frames)]

    def jump(self, x: Tensor, unit: int, stage: int) -> Tensor:
        """Latents up-sampled into ``stage``, with block noise."""
        scheduler = self.config.scheduler
        shape = (*x.shape[:3], 2 * x.shape[3], 2 * x.shape[4])
        noise = {k: self._on_device(z) for k, z in self.noise.jump(unit, stage, shape).items()}
        alpha, beta = scheduler.renoise_coefficients(stage)
        return self.ops.upsample_renoise(x, alpha, beta, gamma=scheduler.gamma, **noise)

    def finish(self, unit: int, x: Tensor) -> None:
        """Adds the latents of a unit to the history."""
        self._write(unit_frames(unit, self.config.frames_per_unit), x)

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
