"""The model as a function of the noisy latents, for all steps of one stage of a unit.

`sampler.integrate` makes one for each stage. Everything that stays the same during a stage is
prepared once: text, mask, positions, patches of the history, the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vidgen.ops import EAGER

from ..model.layers import Condition
from ..model.sequence import pack_patches, patchify
from .state import SamplerState


class StageVelocity:
    """``v(x, timestep)``, with the history, text and cache of a stage."""

    def __init__(self, state: SamplerState, unit: int, stage: int) -> None:
        model, config = state.model, state.config
        self.model, self.dtype = model, state.dtype
        self.is_guided = config.guidance.is_active(unit)
        rows = state.rows(self.is_guided)
        self.text_tokens, self.pooled = (x[rows] for x in state.embedded_text)
        self.n_rows = len(self.text_tokens)

        self.cache = state.cache.stage(unit, stage, self.n_rows)
        past_frames = 0 if self.cache is None else self.cache.past_frames
        # The released code runs the last block on all tokens, and keeps a condition for one step.
        is_released = model.ops is EAGER
        self.packing = model.pack_for_sampling(
            config.column(unit, stage),
            self.text_tokens,
            None if state.text_mask is None else state.text_mask[rows],
            past_frames=past_frames,
            only_current=not is_released,
        )
        clips = [
            self._batch(state.clip(clip, past_frames))
            for clip in config.clips(unit, stage)[:-1]
            if clip.frames.stop > past_frames
        ]
        self.history = [pack_patches([clips])] if clips else []  # [rows, tokens, 4 C]
        self.conditions: dict[int, Condition] | None = None  # by step
        if unit > 0 and not is_released:  # the first unit has steps of its own
            self.conditions = state.conditions.setdefault((stage, self.is_guided), {})

    def __call__(self, x: Tensor, timestep: float, step: int) -> Tensor:
        """The velocity of latents ``x`` ``[B, C, t, h, w]``.

        With guidance it has twice as many rows: of the negative prompts, then of the prompts.
        """
        patches = torch.cat([*self.history, patchify(self._batch(x))], dim=1)
        condition = self._condition(x.new_full((self.n_rows,), timestep), step)
        caches = None if self.cache is None else self.cache.blocks(step)
        velocity = self.model(patches, self.text_tokens, condition, self.packing, caches)
        return self.packing.unpack(velocity)[0]

    def _condition(self, timestep: Tensor, step: int) -> Condition:
        if self.conditions is None:
            return self.model.condition(timestep, self.pooled)
        if step not in self.conditions:
            self.conditions[step] = self.model.condition(timestep, self.pooled, keep=True)
        return self.conditions[step]

    def _batch(self, x: Tensor) -> Tensor:
        """In the model's dtype, with guidance once for each prompt."""
        x = x.to(self.dtype)
        return torch.cat([x, x]) if self.is_guided else x
