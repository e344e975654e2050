"""Keys and values that the units of a video share, so that they are computed once.

Under the causal mask, text and finished frames see nothing of the frame being made. So their keys
and values depend only on the timestep, the pooled text, the stage, and the resolution at which
each frame enters. At the same step of the same stage they are exactly those of the unit before,
for the text and for the oldest frames, up to the first frame whose resolution has changed
(`history.settled_frames`). Across steps or stages nothing can be reused. At stage s the model then
computes only the frames of ``s + 1`` units of history and of the unit being made.

The sampler asks a `KVCache` for a `StageCache`, whose `BlockCache`s attention reads and writes.

An entry holds the keys and values of one step, ``[2, blocks, rows, H, tokens, hd]``: first the
text, then frames. The frames of a unit are written behind those already there. Attention reads an
entry in place, or copies it to the device if the cache is in the memory of the CPU.
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
    """Which stages cache keys and values, and where."""

    stages: tuple[int, ...] | None = None  # None: all
    max_bytes: int | None = None  # stages are cached from the lowest up, while they fit
    on_cpu: bool = False  # copied to the model's device whenever attention reads them


OFF = CachePolicy(stages=())


@dataclass(frozen=True)
class CacheSizes:
    """All that the size of a cache depends on."""

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
    n_given: int = 0  # units that are given, not made

    def capacity(self, stage: int) -> int:
        """Tokens that the last unit reads from the cache; 0: no unit reads any."""
        if self.n_units - self.n_given < 2:
            return 0
        n_frames = settled_frames(self.n_units - 1, stage, self.frames_per_unit)
        return self.text_length + n_frames * self.frame_tokens if n_frames else 0

    def entry_shape(self, stage: int) -> tuple[int, ...]:
        """The shape of an entry, ``[2, blocks, rows, H, tokens, hd]``."""
        capacity = self.capacity(stage)
        return 2, self.n_blocks, self.n_rows, self.n_heads, capacity, self.head_dim

    def stage_bytes(self) -> list[int]:
        """The bytes of each stage if it is cached."""
        return [
            n_steps * prod(self.entry_shape(stage)) * self.dtype.itemsize
            for stage, n_steps in enumerate(self.n_steps)
        ]


class CacheEstimate(NamedTuple):
    """The stages that are cached, and the bytes they take."""

    stages: tuple[int, ...]
    stage_bytes: list[int]  # of all stages, cached or not

    @property
    def n_bytes(self) -> int:
        return sum(self.stage_bytes[stage] for stage in self.stages)


def plan(policy: CachePolicy, sizes: CacheSizes) -> CacheEstimate:
    """Which stages to cache: those of the policy, from the lowest up, while they fit.

    Raises:
        ValueError: a stage that does not exist, a negative number of bytes.
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
    """Keys and values of one block at one step."""

    entry: Tensor  # [2, rows, H, capacity, hd]
    n_past: int  # tokens already in it
    n_new: int  # tokens of this call to write behind them

    def read(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The past keys and values, ``[rows, H, n_past, hd]``."""
        k, v = self.entry[..., : self.n_past, :].to(device, non_blocking=True)
        return k, v

    def write(self, k: Tensor, v: Tensor) -> None:
        """Stores the keys and values of the first ``n_new`` tokens of a call."""
        if self.n_new:
            new = slice(self.n_past, self.n_past + self.n_new)
            for entry, x in zip(self.entry, (k, v), strict=True):
                entry[:, :, new].copy_(x[:, :, : self.n_new], non_blocking=True)


class StageCache(NamedTuple):
    """The cache for one stage of one unit. ``blocks(step)`` is what the model is called with."""

    entries: list[Tensor]  # one for each step, [2, blocks, rows, H, capacity, hd]
    n_past: int
    n_new: int
    past_frames: int  # frames in the cache, whose patches the model is not given

    def blocks(self, step: int) -> Sequence[BlockCache]:
        entries = self.entries[step].unbind(dim=1)
        return [BlockCache(entry, self.n_past, self.n_new) for entry in entries]


class KVCache:
    """The cache of one video, used while it is made.

    Units come in order. A unit without a usable cache, such as the first, computes everything and
    stores it for the next.
    """

    def __init__(self, policy: CachePolicy, sizes: CacheSizes, device: torch.device) -> None:
        self.sizes = sizes
        self.estimate = plan(policy, sizes)
        self._device, self._on_cpu = device, policy.on_cpu
        self._entries: dict[int, list[Tensor]] = {}  # by stage
        self._stored: dict[int, tuple[int, int]] = {}  # by stage: batch rows and frames stored

    def stage(self, unit: int, stage: int, n_rows: int) -> StageCache | None:
        """The cache for a stage of ``unit`` in a batch of ``n_rows``.

        None if the stage neither reads nor writes one.
        """
        per_unit = self.sizes.frames_per_unit
        past_frames = settled_frames(unit, stage, per_unit)
        if self._stored.get(stage) != (n_rows, past_frames):
            past_frames = 0
        next_frames = settled_frames(unit + 1, stage, per_unit)
        if unit + 1 >= self.sizes.n_units or next_frames == 0:
            next_frames = past_frames  # no later unit reads more
        if stage not in self.estimate.stages or next_frames == 0:
            return None
        n_past, n_next = self._tokens(past_frames), self._tokens(next_frames)
        self._stored[stage] = n_rows, next_frames
        entries = [entry[:, :, :n_rows] for entry in self._allocated(stage)]
        return StageCache(entries, n_past, n_next - n_past, past_frames)

    def _tokens(self, n_frames: int) -> int:
        """Tokens of an entry with ``n_frames`` frames."""
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
        # Blocks are outermost, then tokens. So the past of a block is contiguous, and goes to a GPU
        # in one copy.
        order = (1, 4, 0, 2, 3, 5)
        pin = self._device.type == "cuda"
        entry = torch.empty([shape[i] for i in order], dtype=dtype, pin_memory=pin)
        return entry.permute([order.index(i) for i in range(len(order))])
