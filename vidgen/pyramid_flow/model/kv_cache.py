"""Keys and values that are the same from one unit of a video to the next.

Under the causal mask text and finished frames see nothing of the frame that is being made. Their
keys and values depend on the timestep, the pooled text, the stage, and the resolution at which each
frame enters; so at the same step of the same stage they are those of the unit before, exactly, for
the text and the oldest frames, up to the first that has changed its resolution (`settled_frames`).
Across steps or stages nothing can be kept. What a model computes anew at stage s are the frames of
``s + 1`` units of history and the unit being made.

Entries are ``[rows, H, tokens, hd]`` per block, of text and then frames; a unit of frames is
written behind those that are there. Attention reads an entry where it lies, or a copy of it on the
device if the cache is kept in the CPU's memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from .history import settled_frames


@dataclass(frozen=True)
class CachePolicy:
    """Which stages keep keys and values, and where."""

    stages: tuple[int, ...] | None = None  # None: all
    max_bytes: int | None = None  # the lowest of the stages that fit are cached
    on_cpu: bool = False  # copied to the model's device where attention needs them


OFF = CachePolicy(stages=())


@dataclass(frozen=True)
class CacheSizes:
    """What decides how large a cache is."""

    n_blocks: int
    n_rows: int  # of a batch, both branches of guidance
    n_heads: int
    head_dim: int
    text_length: int
    frame_tokens: int  # of a frame at level 0
    n_steps: tuple[int, ...]  # per stage
    n_units: int
    frames_per_unit: int
    dtype: torch.dtype
    n_given: int = 0  # units that are not made

    def capacity(self, stage: int) -> int:
        """Tokens that the last unit finds in the cache; 0: nothing is ever found."""
        if self.n_units - self.n_given < 2:
            return 0
        n_frames = settled_frames(self.n_units - 1, stage, self.frames_per_unit)
        return self.text_length + n_frames * self.frame_tokens if n_frames else 0

    def entry_shape(self, stage: int) -> tuple[int, ...]:
        """Of a step's keys and values, ``[2, blocks, rows, H, tokens, hd]``."""
        capacity = self.capacity(stage)
        return 2, self.n_blocks, self.n_rows, self.n_heads, capacity, self.head_dim

    def stage_bytes(self) -> list[int]:
        """What each stage takes if it is cached."""
        return [
            n_steps * prod(self.entry_shape(stage)) * self.dtype.itemsize
            for stage, n_steps in enumerate(self.n_steps)
        ]


class CacheEstimate(NamedTuple):
    """What `plan` decided."""

    stages: tuple[int, ...]
    stage_bytes: list[int]  # of all stages, cached or not

    @property
    def n_bytes(self) -> int:
        return sum(self.stage_bytes[stage] for stage in self.stages)


def plan(policy: CachePolicy, sizes: CacheSizes) -> CacheEstimate:
    """The stages that are cached, lowest first as long as they fit.

    Raises:
        ValueError: stages that do not exist, a negative number of bytes.
    """
    n_stages, stage_bytes = len(sizes.n_steps), sizes.stage_bytes()
    wanted = range(n_stages) if policy.stages is None else sorted(set(policy.stages))
    for stage in wanted:
        if not 0 <= stage < n_stages:
            raise ValueError(f"stages: expected 0 to {n_stages - 1}, got {stage}")
    if policy.max_bytes is not None and policy.max_bytes < 0:
        raise ValueError(f"max_bytes: expected at least 0, got {policy.max_bytes}")
    chosen: list[int] = []
    left = policy.max_bytes
    for stage in wanted:
        if left is not None and stage_bytes[stage] > left:
            break
        left = None if left is None else left - stage_bytes[stage]
        if stage_bytes[stage]:
            chosen.append(stage)
    return CacheEstimate(tuple(chosen), stage_bytes)


class BlockCache(NamedTuple):
    """Keys and values of one block in one call."""

    entry: Tensor  # [2, rows, H, capacity, hd]
    n_past: int  # tokens that are in it
    n_kept: int  # tokens of the call to write behind them

    def past(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Keys and values of the past, ``[rows, H, n_past, hd]``."""
        k, v = self.entry[..., : self.n_past, :].to(device, non_blocking=True)
        return k, v

    def keep(self, k: Tensor, v: Tensor) -> None:
        """Writes the first tokens of a call."""
        if self.n_kept:
            kept = slice(self.n_past, self.n_past + self.n_kept)
            for entry, x in zip(self.entry, (k, v), strict=True):
                entry[:, :, kept].copy_(x[:, :, : self.n_kept], non_blocking=True)


class StageCache(NamedTuple):
    """The cache of one stage of one unit; ``blocks(step)`` goes to the model."""

    entries: list[Tensor]  # per step, [2, blocks, rows, H, capacity, hd]
    n_past: int
    n_kept: int
    past_frames: int  # frames in the cache, which the model is not given

    def blocks(self, step: int) -> Sequence[BlockCache]:
        entries = self.entries[step].unbind(dim=1)
        return [BlockCache(entry, self.n_past, self.n_kept) for entry in entries]


class KVCache:
    """The keys and values of one video while it is made.

    Units come in order. One that does not find what the unit before it should have left, as the
    first does, computes everything and leaves it for the next.
    """

    def __init__(self, policy: CachePolicy, sizes: CacheSizes, device: torch.device) -> None:
        self.sizes = sizes
        self.estimate = plan(policy, sizes)
        self._device, self._on_cpu = device, policy.on_cpu
        self._entries: dict[int, list[Tensor]] = {}  # by stage
        self._found: dict[int, tuple[int, int]] = {}  # by stage: batch rows and frames kept

    def stage(self, unit: int, stage: int, n_rows: int) -> StageCache | None:
        """For a stage of ``unit`` in a batch of ``n_rows``; None: it neither reads nor writes."""
        per_unit = self.sizes.frames_per_unit
        past_frames = settled_frames(unit, stage, per_unit)
        rows_found, frames_found = self._found.get(stage, (0, 0))
        if rows_found != n_rows or frames_found != past_frames:
            past_frames = 0
        next_frames = settled_frames(unit + 1, stage, per_unit)
        if unit + 1 >= self.sizes.n_units or next_frames == 0:
            next_frames = past_frames  # nobody reads more
        if stage not in self.estimate.stages or next_frames == 0:
            return None
        n_past, n_next = self._tokens(past_frames), self._tokens(next_frames)
        self._found[stage] = n_rows, next_frames
        entries = [entry[:, :, :n_rows] for entry in self._allocated(stage)]
        return StageCache(entries, n_past, n_next - n_past, past_frames)

    def _tokens(self, n_frames: int) -> int:
        """In an entry that holds ``n_frames`` frames."""
        text_length = self.sizes.text_length if n_frames else 0
        return text_length + n_frames * self.sizes.frame_tokens

    def _allocated(self, stage: int) -> list[Tensor]:
        if stage not in self._entries:
            n_steps = self.sizes.n_steps[stage]
            self._entries[stage] = [self._empty_entry(stage) for _ in range(n_steps)]
        return self._entries[stage]

    def _empty_entry(self, stage: int) -> Tensor:
        shape, dtype = self.sizes.entry_shape(stage), self.sizes.dtype
        if not self._on_cpu:
            return torch.empty(shape, dtype=dtype, device=self._device)
        # Tokens outermost but for the blocks: what attention needs of a block is one piece, and
        # goes to a GPU in one copy.
        order = (1, 4, 0, 2, 3, 5)
        pin = self._device.type == "cuda"
        entry = torch.empty([shape[i] for i in order], dtype=dtype, pin_memory=pin)
        return entry.permute([order.index(i) for i in range(len(order))])
