"""`IntervalMask`: which query sees which key, as intervals of positions.

The masks of video models are made of blocks: runs of consecutive tokens that see the same keys (a
frame, a chunk of frames, text and frame 0, a set of tokens of equal rank). A mask holds two tables:
for every block of queries the intervals of keys that it sees, and for every block of keys the
intervals of queries that see it. A block has at most three intervals in each. Forward and dQ read
the first table, dK/dV reads the second.

Masks are built per block with PyTorch alone. `IntervalMask.intervals` expands them to the form that
the kernels read, one entry per token (`TokenIntervals`). `mask_inputs.py` checks the arguments,
`runs.py` holds one side of a mask.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.front_door import is_traced
from .mask_inputs import (
    BlockLengths,
    Device,
    are_same_lengths,
    block_edges,
    check_first_noisy,
    check_ranks,
    check_window,
    count_lengths,
    lengths_list,
    lengths_tensor,
    on_host,
    query_block_range,
    require,
    require_sorted,
    resolve_device,
)
from .runs import Runs, concatenate


class TokenIntervals(NamedTuple):
    """Half-open intervals of every token. I is 1 to 3 and may differ between queries and keys."""

    q_begin: Tensor  # int32 [I, B or 1, Tq], keys that a query sees
    q_end: Tensor
    k_begin: Tensor  # int32 [I, B or 1, Tk], queries that see a key
    k_end: Tensor


@dataclass(frozen=True, eq=False)
class IntervalMask:
    """Which query sees which key. Build one with the class methods; `pack` and `pad_text` combine.

    One mask serves every layer and step of a layout. Its per-token form is computed at the first
    call, on the current stream, and kept. To use the mask on another stream, make that stream wait
    for the first one, as for any tensor.

    `torch.save`, `pickle` and `copy` take a mask without its per-token form: a few numbers per
    block. `torch.load` reads it, with ``weights_only=True`` as well.
    """

    queries: Runs
    keys: Runs
    n_queries: int | None  # None if the lengths are on a GPU: they are not read back
    n_keys: int | None
    text_queries: bool  # whether the first query tokens are the first key tokens
    parts: tuple[IntervalMask, ...] = ()  # the masks that `pack` joined; they can run one by one
    _per_token: dict[tuple[int, int], TokenIntervals] = field(default_factory=dict, repr=False)

    @classmethod
    def block_causal(
        cls,
        block_lengths: BlockLengths,
        *,
        query_blocks: range | None = None,
        window: int | None = None,
        sink_blocks: int = 0,
        device: Device = None,
    ) -> IntervalMask:
        """Block i sees block j iff j <= i and, with a window, j > i - window or j < sink_blocks.

        Args:
            block_lengths: tokens per block, any sizes: ints, or an int tensor ``[N]``.
            query_blocks: only these blocks are queries (a KV-cache step); keys are all blocks.
            window: how many blocks a block sees, itself included.
            sink_blocks: this many first blocks are seen by all later ones, whatever the window.
            device: where the mask lies; default CPU, or the device of the lengths if these are a
                tensor.

        Raises:
            ValueError: lengths other than integers of 0 or more, a window below 1, a negative
                number of sinks, query blocks outside ``0..N``.
        """
        n_blocks = count_lengths("block_lengths", block_lengths)
        start, stop = query_block_range(query_blocks, n_blocks)
        check_window(window, sink_blocks)
        lengths = {"block_lengths": block_lengths}
        return _build(_block_causal, lengths, (start, stop, window, sink_blocks), device)

    @classmethod
    def teacher_forcing(
        cls,
        block_lengths: BlockLengths,
        *,
        window: int | None = None,
        sink_blocks: int = 0,
        first_noisy: int = 0,
        device: Device = None,
    ) -> IntervalMask:
        """``[clean | noisy]`` copies of the blocks, for training as in CausVid and Self-Forcing.

        Clean block i sees clean blocks as in `block_causal`. Noisy block i sees itself and the
        clean blocks before i, within the same window and sinks.

        Args:
            first_noisy: blocks before this one are conditions and have no noisy copy.

        Other arguments and errors: see `block_causal`.
        """
        check_window(window, sink_blocks)
        n_blocks = count_lengths("block_lengths", block_lengths)
        check_first_noisy(first_noisy, n_blocks)
        lengths = {"block_lengths": block_lengths}
        return _build(_teacher_forcing, lengths, (window, sink_blocks, first_noisy), device)

    @classmethod
    def full(
        cls, q_lengths: BlockLengths, k_lengths: BlockLengths, *, device: Device = None
    ) -> IntervalMask:
        """Block-diagonal: the queries of sequence i see all keys of sequence i.

        Args:
            q_lengths, k_lengths: tokens per sequence, ints or int tensors ``[N]``. If they are
                equal (on a GPU: the same object), `pad_text` treats queries and keys as the same
                tokens.

        Raises:
            ValueError: different numbers of sequences, or bad lengths.
        """
        n_sequences = count_lengths("q_lengths", q_lengths)
        if count_lengths("k_lengths", k_lengths) != n_sequences:
            raise ValueError(
                f"k_lengths: expected {n_sequences} sequences as in q_lengths, got {len(k_lengths)}"
            )
        lengths = {"q_lengths": q_lengths, "k_lengths": k_lengths}
        return _build(_full, lengths, (are_same_lengths(q_lengths, k_lengths),), device)

    @classmethod
    def from_ranks(cls, rank_q: Tensor, rank_k: Tensor | None = None) -> IntervalMask:
        """Query i sees key j iff ``rank_k[j] <= rank_q[i]``; ranks are sorted, smallest first.

        Args:
            rank_q, rank_k: integers ``[T]`` or ``[B, T]``; ``rank_k`` defaults to ``rank_q``.

        Raises:
            ValueError: other dtypes or shapes, different devices or batches, or (on a CPU) ranks
                that are not sorted. For ranks in any order use `set_masked_attention`.
        """
        q = check_ranks("rank_q", rank_q)
        is_self = rank_k is None or rank_k is rank_q
        k = q if rank_k is None else check_ranks("rank_k", rank_k)
        if q.device != k.device or (len(q) != len(k) and 1 not in (len(q), len(k))):
            raise ValueError(
                f"rank_k: expected device {q.device} and batch {len(q)} as rank_q has, or batch 1, "
                f"got device {k.device} and batch {len(k)}"
            )
        if is_self and len(q) == 1 and on_host(q):  # tokens of equal rank form a block
            ranks, lengths = q[0].unique_consecutive(return_counts=True)
            require_sorted("rank_q", ranks[None])
            return cls.block_causal(lengths)
        require_sorted("rank_q", q)
        if not is_self:
            require_sorted("rank_k", k)
        return sorted_ranks(q, k, text_queries=is_self)

    @classmethod
    def pack(cls, masks: Sequence[IntervalMask]) -> IntervalMask:
        """Block-diagonal: sequences one after another, each under its own mask.

        Raises:
            ValueError: no masks, different devices, or different batch sizes other than 1.
        """
        masks = list(masks)
        if not masks:
            raise ValueError("masks: expected at least one, got none")
        devices = {m.device for m in masks}
        batches = {m.batch_size for m in masks} - {1}
        if len(devices) > 1 or len(batches) > 1:
            raise ValueError(
                "masks: expected one device and batch sizes of 1 or one other, "
                f"got devices {sorted(map(str, devices))}, batch sizes {sorted(batches)}"
            )
        queries, keys = [m.queries for m in masks], [m.keys for m in masks]
        return cls(
            concatenate(queries, keys),
            concatenate(keys, queries),
            _sum([m.n_queries for m in masks]),
            _sum([m.n_keys for m in masks]),
            masks[0].text_queries,
            tuple(masks),
        )

    @classmethod
    def pad_text(
        cls, mask: IntervalMask, text_length: int, valid_lengths: BlockLengths
    ) -> IntervalMask:
        """``mask`` that hides padded text tokens: those past the valid length of each batch row.

        The first ``text_length`` keys are text, valid tokens first. No query sees a padded key. If
        block 0 is among the queries, text tokens are queries too; padded ones see nothing, and
        their output is 0. As with any mask, unseen keys and values must still be finite.

        Args:
            valid_lengths: valid text tokens per batch row, ints or an int tensor ``[B]``.

        Raises:
            ValueError: text longer than the sequence, valid lengths outside ``0..text_length``,
                a batch size other than the mask's, or a mask that would need four intervals.
        """
        (n_text,) = lengths_list("text_length", [text_length])
        if mask.n_keys is not None and n_text > mask.n_keys:
            raise ValueError(f"text_length: expected at most {mask.n_keys} keys, got {n_text}")
        n_valid = count_lengths("valid_lengths", valid_lengths)
        if n_valid == 0 or (mask.batch_size != 1 and n_valid not in (1, mask.batch_size)):
            raise ValueError(f"valid_lengths: expected {mask.batch_size} values, got {n_valid}")
        if not isinstance(valid_lengths, Tensor):
            for n in lengths_list("valid_lengths", valid_lengths):
                if n > n_text:
                    raise ValueError(f"valid_lengths: expected values in 0..{n_text}, got {n}")
        valid = lengths_tensor("valid_lengths", valid_lengths, mask.device).to(torch.int32)[:, None]
        in_range = ((valid >= 0) & (valid <= n_text)).all()
        require(in_range, f"valid_lengths: expected values in 0..{n_text}, got others")
        if n_text == 0:
            return mask
        text = torch.full_like(valid, n_text)
        points = torch.cat([valid, text], dim=-1)
        keys = mask.keys.split(points).emptied(valid, text)
        queries = mask.queries.without(valid, text)
        if mask.text_queries:
            points = points.clamp(max=mask.queries.n_tokens)  # queries may end within the text
            queries = queries.split(points).emptied(valid, text)
            keys = keys.without(valid, text)
        return cls(queries, keys, mask.n_queries, mask.n_keys, mask.text_queries)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and files leave out the per-token form, which is computed again when needed."""
        return {**self.__dict__, "_per_token": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @property
    def device(self) -> torch.device:
        return self.queries.begin.device

    @property
    def batch_size(self) -> int:
        """1 if all batch rows share the mask."""
        return max(self.queries.batch_size, self.keys.batch_size)

    def to(self, device: torch.device | str) -> IntervalMask:
        """A copy on another device. Every call makes a new one, so keep it."""
        device = resolve_device(device)
        if device == self.device:
            return self
        queries, keys = self.queries.to(device), self.keys.to(device)
        parts = tuple(part.to(device) for part in self.parts)
        return IntervalMask(queries, keys, self.n_queries, self.n_keys, self.text_queries, parts)

    def intervals(self, n_queries: int, n_keys: int) -> TokenIntervals:
        """The per-token form, computed once and kept.

        Raises:
            ValueError: the mask was built for other numbers of tokens.
        """
        for name, expected, actual in (
            ("queries", self.n_queries, n_queries),
            ("keys", self.n_keys, n_keys),
        ):
            if expected is not None and expected != actual:
                raise ValueError(f"mask: expected {expected} {name}, got {actual}")
        if is_traced():
            return self._expand(n_queries, n_keys)
        if (n_queries, n_keys) in self._per_token:
            return self._per_token[n_queries, n_keys]
        with torch.inference_mode(False):  # kept tensors must serve training too
            intervals = self._expand(n_queries, n_keys)
        # in a CUDA graph capture nothing runs, so the tensors have no values to keep
        if not (self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            self._per_token[n_queries, n_keys] = intervals
        return intervals

    def _expand(self, n_queries: int, n_keys: int) -> TokenIntervals:
        # No counts in these messages: torch.compile would specialize on them.
        for name, runs, n_tokens in (
            ("queries", self.queries, n_queries),
            ("keys", self.keys, n_keys),
        ):
            if isinstance(runs.n_tokens, Tensor):
                is_sum = runs.n_tokens == n_tokens
                require(is_sum, f"mask: expected lengths that sum to the number of {name}")
        tables = (*self.queries.expand(n_queries), *self.keys.expand(n_keys))
        if is_traced():
            return TokenIntervals(*tables)
        return TokenIntervals(*(x.clone() if x.is_inference() else x for x in tables))

    def to_dense(self, n_queries: int | None = None, n_keys: int | None = None) -> Tensor:
        """Bool ``[B or 1, Tq, Tk]``, True where a query sees a key. For inspection and tests.

        Args:
            n_queries, n_keys: as those of q and k. By default the mask is asked: where it was built
                from lengths in a tensor, or from any under a tracer, that reads the tensor.
        """
        if n_queries is None:
            n_queries = int(self.queries.n_tokens) if self.n_queries is None else self.n_queries
        if n_keys is None:
            n_keys = int(self.keys.n_tokens) if self.n_keys is None else self.n_keys
        begin, end, _, _ = self.intervals(n_queries, n_keys)
        key = torch.arange(n_keys, device=self.device)
        return ((key >= begin[..., None]) & (key < end[..., None])).any(dim=0)


# `torch.load` of a saved mask works with weights_only=True wherever this package is imported.
torch.serialization.add_safe_globals([IntervalMask, Runs])


def sorted_ranks(rank_q: Tensor, rank_k: Tensor, *, text_queries: bool = False) -> IntervalMask:
    """The mask of sorted ranks, int64 ``[B or 1, T]``: a query sees all keys up to its rank."""
    n_batch, n_queries, n_keys = max(len(rank_q), len(rank_k)), rank_q.shape[1], rank_k.shape[1]
    rank_q, rank_k = (r.expand(n_batch, -1).contiguous() for r in (rank_q, rank_k))
    q_end = torch.searchsorted(rank_k, rank_q, right=True, out_int32=True)[None]
    k_begin = torch.searchsorted(rank_q, rank_k, out_int32=True)[None]
    queries = Runs(None, torch.zeros_like(q_end), q_end)
    keys = Runs(None, k_begin, torch.full_like(k_begin, n_queries))
    return IntervalMask(queries, keys, n_queries, n_keys, text_queries)


def _build(
    builder: Callable[..., IntervalMask],
    lengths: dict[str, BlockLengths],
    rules: tuple,
    device: Device,
) -> IntervalMask:
    """Returns ``builder(*edges, *rules)``, where edges are those of ``lengths`` (`block_edges`).

    For ints the mask is built on the CPU, cached and copied to ``device``. For tensors it is built
    on their device.
    """
    tensors = [x for x in lengths.values() if isinstance(x, Tensor)]
    default = tensors[0].device if tensors else "cpu"
    device = resolve_device(default if device is None else device)
    if tensors or is_traced():
        return builder(*(block_edges(name, x, device) for name, x in lengths.items()), *rules)
    ints = tuple(
        (name, tuple(lengths_list(name, x)))
        for name, x in lengths.items()
        if not isinstance(x, Tensor)  # always true, for the type checker
    )
    return _build_on_host(builder, ints, rules, device)


# The same few layouts come back at every step, so masks built from ints are cached. Masks built
# from tensors are not: a tensor may be written to after the call.
@functools.lru_cache(maxsize=64)
def _build_on_host(builder, lengths, rules, device) -> IntervalMask:
    with torch.inference_mode(False):  # cached tensors must serve training too
        host = torch.device("cpu")
        tensors = ((name, torch.tensor(x, dtype=torch.int64, device=host)) for name, x in lengths)
        edges = (block_edges(name, x, host) for name, x in tensors)
        mask = builder(*edges, *rules).to(device)
    mask.queries.mark_dynamic()
    mask.keys.mark_dynamic()
    return mask


def _block_causal(
    edges: Tensor, start: int, stop: int, window: int | None, sink_blocks: int
) -> IntervalMask:
    n_blocks = len(edges) - 1
    i = torch.arange(start, stop, device=edges.device)
    q_edges = edges[start : stop + 1] - edges[start]
    queries = Runs.of(q_edges, _past_blocks(edges, i, i + 1, window, sink_blocks))
    # Query blocks that see key block j: from j to the last one whose window reaches back to j.
    j = torch.arange(n_blocks, device=edges.device)
    last = _last_query_block(j, n_blocks, window, sink_blocks)
    begin, end = (edges[x.clamp(start, stop)] - edges[start] for x in (j, last))
    keys = Runs.of(edges, [(begin, end)])
    return IntervalMask(
        queries, keys, _total(q_edges), _total(edges), text_queries=start == 0 < stop
    )


def _teacher_forcing(
    edges: Tensor, window: int | None, sink_blocks: int, first_noisy: int
) -> IntervalMask:
    n_blocks, n_clean = len(edges) - 1, edges[-1]
    i = torch.arange(n_blocks, device=edges.device)
    of_noisy = n_clean + (edges - edges[first_noisy]).clamp(min=0)  # edges of the noisy copies
    itself = (of_noisy[first_noisy:-1], of_noisy[first_noisy + 1 :])
    nothing = (torch.zeros_like(edges[1:]), torch.zeros_like(edges[1:]))

    clean = [*_past_blocks(edges, i, i + 1, window, sink_blocks), nothing]
    j = i[first_noisy:]
    noisy = [*_past_blocks(edges, j, j, window, sink_blocks), itself]
    last = _last_query_block(i, n_blocks, window, sink_blocks)
    by_clean = (edges[:-1], edges[last])
    by_noisy = (of_noisy[1:], of_noisy[last])

    both = torch.cat([edges, itself[1]])
    queries = Runs.of(both, [_join(c, n) for c, n in zip(clean, noisy, strict=True)])
    no_other = (nothing[0][first_noisy:], nothing[1][first_noisy:])
    keys = Runs.of(both, [_join(by_clean, itself), _join(by_noisy, no_other)])
    return IntervalMask(queries, keys, _total(both), _total(both), text_queries=True)


def _full(q_edges: Tensor, k_edges: Tensor, is_self: bool) -> IntervalMask:
    queries = Runs.of(q_edges, [(k_edges[:-1], k_edges[1:])])
    keys = Runs.of(k_edges, [(q_edges[:-1], q_edges[1:])])
    return IntervalMask(queries, keys, _total(q_edges), _total(k_edges), text_queries=is_self)


def _past_blocks(
    edges: Tensor, i: Tensor, stop: Tensor, window: int | None, sink_blocks: int
) -> list[tuple[Tensor, Tensor]]:
    """Keys that query block i sees among the blocks before ``stop``: sinks, then the window."""
    if window is None:
        return [(torch.zeros_like(edges[stop]), edges[stop])]
    first = (i - window + 1).clamp(min=0)
    recent = (edges[first], edges[stop])
    if sink_blocks == 0:
        return [recent]
    sinks = edges[first.clamp(max=sink_blocks)]
    return [(torch.zeros_like(sinks), sinks), recent]


def _last_query_block(j: Tensor, n_blocks: int, window: int | None, sink_blocks: int) -> Tensor:
    """One past the last query block that sees key block j."""
    if window is None:
        return torch.full_like(j, n_blocks)
    return torch.where(j < sink_blocks, n_blocks, j + window).clamp(max=n_blocks)


def _join(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]])


def _total(edges: Tensor) -> int | None:
    """The number of tokens, or None if reading it would wait for the GPU."""
    return int(edges[-1]) if on_host(edges) else None


def _sum(counts: list[int | None]) -> int | None:
    known = [n for n in counts if n is not None]
    return sum(known) if len(known) == len(counts) else None
