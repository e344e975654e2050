"""`Runs`: one side of a mask, queries or keys, as runs of tokens with the same intervals.

A mask holds two `Runs`: for each run of queries the intervals of keys that it sees, and for each
run of keys the intervals of queries that see it. `intervals.py` builds and combines them.

Legend: I intervals (at most 3), B batch rows of the mask (1 if all share it), R runs, T tokens.
Positions are int32. What is on a GPU is computed there and never read back.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from .mask_inputs import on_host, require

MAX_INTERVALS = 3


@dataclass(frozen=True, eq=False)
class Runs:
    """Consecutive tokens that see the same half-open intervals; an empty interval is 0..0."""

    stop: Tensor | None  # [B or 1, R], one past the last token of a run; None: runs of one token
    begin: Tensor  # [I, B or 1, R]
    end: Tensor

    @classmethod
    def of(cls, edges: Tensor, intervals: Sequence[tuple[Tensor, Tensor]]) -> Runs:
        """From run edges ``[R + 1]`` and intervals in any order, each a pair of ``[R]``.

        A single run is padded to two: torch.compile specializes on size 1.
        """
        if len(edges) == 2:
            edges = torch.cat([edges, edges[1:]])
            intervals = [(begin.repeat(2), end.repeat(2)) for begin, end in intervals]
        begin, end = (torch.stack(x)[:, None] for x in zip(*intervals, strict=True))
        return cls(edges[None, 1:], *_tidy(begin, end, limit=len(intervals)))

    @property
    def batch_size(self) -> int:
        return self.begin.shape[1]

    @property
    def starts(self) -> Tensor:
        """First token of each run, ``[B or 1, R]``."""
        if self.stop is None:
            n_runs = self.begin.shape[-1]
            return torch.arange(n_runs, dtype=torch.int32, device=self.begin.device)[None]
        return pad(self.stop[:, :-1], (1, 0))

    @property
    def n_tokens(self) -> Tensor | int:
        """The number of tokens: a tensor (not read back from a GPU), or an int if it is known."""
        if self.stop is None:
            return self.begin.shape[-1]
        return self.stop[0, -1] if self.stop.shape[-1] else 0

    def expand(self, n_tokens: int) -> tuple[Tensor, Tensor]:
        """``begin`` and ``end`` of every token, contiguous ``[I, B or 1, n_tokens]``."""
        if self.stop is None:
            return self.begin.contiguous(), self.end.contiguous()
        if self.stop.shape[-1] == 0:
            nothing = self.begin.new_zeros(*self.begin.shape[:2], n_tokens)
            return nothing, nothing
        if on_host(self.stop):
            return self._fill(self.stop, n_tokens)
        token = torch.arange(n_tokens, dtype=torch.int32, device=self.stop.device)
        run = torch.searchsorted(self.stop, token.repeat(len(self.stop), 1), right=True)
        run = run.clamp_(max=self.stop.shape[-1] - 1).expand(*self.begin.shape[:2], n_tokens)
        return self.begin.gather(-1, run), self.end.gather(-1, run)

    def _fill(self, stop: Tensor, n_tokens: int) -> tuple[Tensor, Tensor]:
        """`expand` on a CPU. Copying run by run is faster than a gather, which reads an int64
        index, twice the size of the result."""
        table = torch.stack([self.begin, self.end])
        out = table.new_empty(*table.shape[:3], n_tokens)
        # stops [B, R] differ by batch row, so rows are filled one by one; [1, R] fill all at once
        rows = [slice(b, b + 1) for b in range(len(stop))] if len(stop) > 1 else [slice(None)]
        for row, stops in zip(rows, stop.tolist(), strict=True):
            lengths = [hi - lo for lo, hi in itertools.pairwise([0, *stops])]
            pieces = out[:, :, row].split(lengths, dim=-1)
            torch._foreach_copy_(pieces, table[:, :, row].split(1, dim=-1))
        return out[0], out[1]

    def split(self, points: Tensor) -> Runs:
        """The same intervals on finer runs that also start at ``points`` ``[B, P]``."""
        if self.stop is None:
            return self
        n_batch = max(len(self.stop), len(points))
        old = self.stop.expand(n_batch, -1).contiguous()
        stop = torch.cat([old, points.expand(n_batch, -1)], dim=-1).sort(dim=-1).values
        run = torch.searchsorted(old, pad(stop[:, :-1], (1, 0)), right=True)
        run = run.clamp_(max=old.shape[-1] - 1).expand(len(self.begin), n_batch, -1)
        begin, end = (x.expand(-1, n_batch, -1).gather(-1, run) for x in (self.begin, self.end))
        return Runs(stop, begin, end)

    def without(self, begin: Tensor, end: Tensor) -> Runs:
        """Cuts positions ``begin..end`` ``[B, 1]`` out of all intervals; may add one interval."""
        left = torch.broadcast_tensors(self.begin, self.end.minimum(begin))
        right = torch.broadcast_tensors(self.begin.maximum(end), self.end)
        pieces = (torch.cat(x) for x in zip(left, right, strict=True))
        return Runs(self.stop, *_tidy(*pieces, limit=len(self.begin) + 1))

    def emptied(self, begin: Tensor, end: Tensor) -> Runs:
        """The same runs, but those that start in ``begin..end`` ``[B, 1]`` see nothing."""
        keep = ((self.starts < begin) | (self.starts >= end)).to(torch.int32)
        return Runs(self.stop, self.begin * keep, self.end * keep)

    def mark_dynamic(self) -> None:
        """Tells torch.compile that the number of runs varies, so that a new layout does not
        recompile."""
        for x in (self.stop, self.begin, self.end):
            if x is not None:
                torch._dynamo.maybe_mark_dynamic(x, x.ndim - 1)

    def to(self, device: torch.device) -> Runs:
        # A blocking copy would wait for the GPU. These few bytes are buffered by the driver, so the
        # source may be freed at once.
        stop = None if self.stop is None else self.stop.to(device, non_blocking=True)
        begin, end = (x.to(device, non_blocking=True) for x in (self.begin, self.end))
        return Runs(stop, begin, end)


def concatenate(runs: Sequence[Runs], others: Sequence[Runs]) -> Runs:
    """Joins one side of several masks, one after another.

    ``others`` are the other sides of the same masks. Intervals are positions there, so those of
    mask i move by the number of tokens in ``others[:i]``.
    """
    n_intervals = max(len(r.begin) for r in runs)
    n_batch = max(r.batch_size for r in runs)
    stops, begins, ends = [], [], []
    row_offset = offset = torch.zeros((), dtype=torch.int32, device=runs[0].begin.device)
    for run, other in zip(runs, others, strict=True):
        begin, end = (
            pad(x, (0, 0, 0, 0, 0, n_intervals - len(x))).expand(-1, n_batch, -1)
            for x in (run.begin, run.end)
        )
        shift = torch.where(begin < end, offset, 0)
        stop = run.starts + 1 if run.stop is None else run.stop
        stops.append(stop.expand(n_batch, -1) + row_offset)
        begins.append(begin + shift)
        ends.append(end + shift)
        row_offset = row_offset + run.n_tokens
        offset = offset + other.n_tokens
    return Runs(*(torch.cat(x, dim=-1) for x in (stops, begins, ends)))


def _tidy(begin: Tensor, end: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Sorts the intervals of each run, merges touching ones, drops empty ones.

    Keeps ``limit`` intervals, the most that this kind of mask can need. The number does not depend
    on the lengths, so a new layout does not recompile.
    """
    begin, end = _by_begin(begin, end)
    for s in range(len(begin) - 1):  # merge an interval that touches the next into it
        touches = (begin[s + 1] <= end[s]) & (begin[s + 1] < end[s + 1])
        carried, rest = torch.where(touches, begin[s], begin[s + 1]), end[s].masked_fill(touches, 0)
        begin = torch.cat([begin[: s + 1], carried[None], begin[s + 2 :]])
        end = torch.cat([end[:s], rest[None], end[s + 1 :]])
    begin, end = _by_begin(begin, end)
    is_empty = begin >= end
    begin, end = (x.masked_fill(is_empty, 0).to(torch.int32) for x in (begin, end))
    if limit > MAX_INTERVALS:
        fits = is_empty[MAX_INTERVALS:].all()
        require(fits, f"mask: expected at most {MAX_INTERVALS} intervals per token, got more")
    limit = min(limit, MAX_INTERVALS)
    return begin[:limit], end[:limit]


def _by_begin(begin: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Intervals in order of their begin, empty ones last."""
    if len(begin) == 1:
        return begin, end
    key = begin.masked_fill(begin >= end, torch.iinfo(torch.int32).max)
    order = key.argsort(dim=0, stable=True)
    return begin.gather(0, order), end.gather(0, order)
