"""The CPU implementation of the attention engine: PyTorch's fused attention on chunks of query rows.

Rows that see the same keys (a frame, a set) go through one call on just those keys, without a mask.
Shorter runs are joined to chunks of at least `MIN_ROWS` rows, so that the matrix products stay long;
only such a ragged chunk builds a mask, [rows, keys]. Memory is O(MIN_ROWS x T), never T x T.

The calls below `torch.nn.functional.scaled_dot_product_attention` are used because they return the lse
and take it back in the backward, which then need not repeat the forward.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

MIN_ROWS = 256

_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Chunk(NamedTuple):
    rows: slice
    keys: list[slice]  # every key that some row of the chunk sees, in order
    mask: Tensor | None  # [B or 1, 1, rows, keys] added to the scores; None: all rows see all keys


def interval_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, begin: Tensor, end: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """``out`` like q and ``lse`` [B, H, Tq]; ``begin``, ``end`` are int32 [I, B or 1, Tq]."""
    out = torch.zeros_like(q)
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_full(q.shape[:3], float("-inf"), dtype=lse_dtype)
    for chunk in _chunks(begin, end, q.dtype):
        k_chunk, v_chunk = (_take(x, chunk.keys) for x in (k, v))
        for heads in _head_groups(q, k):
            out_chunk, lse_chunk = _attention(
                q[:, heads, chunk.rows], k_chunk, v_chunk, attn_mask=chunk.mask, scale=softmax_scale
            )
            out[:, heads, chunk.rows] = out_chunk
            lse[:, heads, chunk.rows] = lse_chunk
    is_empty = (begin >= end).all(dim=0)[:, None]  # [B or 1, 1, Tq]
    return out, lse.masked_fill_(is_empty, float("-inf"))


def interval_attention_bwd(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    begin: Tensor,
    end: Tensor,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dq, dk, dv`` like q, k, v. Sums over chunks and heads are kept in fp32 or wider."""
    dq = torch.zeros_like(q)
    sum_dtype = torch.promote_types(q.dtype, torch.float32)
    dk, dv = (torch.zeros_like(x, dtype=sum_dtype) for x in (k, v))
    # With p = exp(s - lse) = 0 for a row that sees nothing: s is -inf there, lse any finite number.
    lse = lse.masked_fill(lse == float("-inf"), 0.0)
    for chunk in _chunks(begin, end, q.dtype):
        k_chunk, v_chunk = (_take(x, chunk.keys) for x in (k, v))
        for heads in _head_groups(q, k):
            rows = (slice(None), heads, chunk.rows)
            operands = [do[rows], q[rows], k_chunk, v_chunk, out[rows]]
            if dlse is not None:
                operands = _with_dlse_columns(*operands, dlse[rows])
            gradients = _attention_backward(
                *operands, lse[rows], 0.0, False, attn_mask=chunk.mask, scale=softmax_scale
            )
            dq_chunk, dk_chunk, dv_chunk = (x[..., : q.shape[-1]] for x in gradients)
            dq[rows] = dq_chunk
            _add(dk, dk_chunk, chunk.keys)
            _add(dv, dv_chunk, chunk.keys)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _with_dlse_columns(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, dlse: Tensor
) -> list[Tensor]:
    """Two more head dims that turn delta = do . out into do . out - dlse and change nothing else.

    do gets ones and out gets -dlse, as a rounded value and its remainder, so that low precision loses
    nothing; q, k and v get zeros, so s and do . v stay.
    """
    pad = torch.nn.functional.pad
    high = -dlse.to(out.dtype)
    low = (-dlse - high).to(out.dtype)
    padded = [pad(do, (0, 2), value=1.0), *(pad(x, (0, 2)) for x in (q, k, v))]
    return [*padded, torch.cat([out, high[..., None], low[..., None]], dim=-1)]


def _head_groups(q: Tensor, k: Tensor) -> Iterator[slice]:
    """Query heads that read the key heads in order: all of them, or one of each group at a time."""
    group = q.shape[1] // k.shape[1]
    return (slice(g, None, group) for g in range(group))


def _chunks(begin: Tensor, end: Tensor, dtype: torch.dtype) -> Iterator[Chunk]:
    """Covers all rows that see a key; adjacent short runs share a chunk."""
    n_rows = begin.shape[-1]
    changes = ((begin.diff(dim=-1) != 0) | (end.diff(dim=-1) != 0)).flatten(0, 1).any(dim=0)
    edges = [0, *(changes.nonzero()[:, 0] + 1).tolist(), n_rows]
    start = 0
    for stop, next_stop in itertools.pairwise([*edges[1:], n_rows + MIN_ROWS]):
        if stop == start or (stop - start < MIN_ROWS and next_stop - stop < MIN_ROWS):
            continue
        rows = slice(start, stop)
        chunk = _chunk(rows, begin[..., rows], end[..., rows], dtype)
        if chunk.keys:
            yield chunk
        start = stop


def _chunk(rows: slice, begin: Tensor, end: Tensor, dtype: torch.dtype) -> Chunk:
    """``begin``, ``end``: the intervals of the rows of the chunk, [I, B or 1, rows]."""
    flat_begin, flat_end = begin.flatten(1), end.flatten(1)
    never = torch.iinfo(begin.dtype).max
    first = torch.where(flat_begin < flat_end, flat_begin, never).amin(dim=1).tolist()
    last = flat_end.amax(dim=1).tolist()
    keys: list[slice] = []
    for lo, hi in sorted(zip(first, last, strict=True)):
        if lo >= hi:
            continue
        if keys and lo - keys[-1].stop < MIN_ROWS:  # masking a small gap is cheaper than a copy
            keys[-1] = slice(keys[-1].start, max(hi, keys[-1].stop))
        else:
            keys.append(slice(lo, hi))
    n_keys = sum(s.stop - s.start for s in keys)
    n_seen = (flat_end - flat_begin).clamp_(min=0).sum(dim=0, dtype=torch.int64)
    if bool((n_seen == n_keys).all()):
        return Chunk(rows, keys, None)
    key = torch.cat(
        [torch.arange(s.start, s.stop, dtype=begin.dtype) for s in keys] or [begin[:0, 0, 0]]
    )
    hidden = torch.ones(begin.shape[1], begin.shape[2], n_keys, dtype=torch.bool)
    for i in range(len(begin)):
        hidden &= (key < begin[i, ..., None]) | (key >= end[i, ..., None])
    mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
    return Chunk(rows, keys, mask[:, None])


def _take(x: Tensor, keys: list[slice]) -> Tensor:
    if len(keys) == 1:
        return x[:, :, keys[0]]
    return torch.cat([x[:, :, s] for s in keys], dim=2)


def _add(total: Tensor, part: Tensor, keys: list[slice]) -> None:
    """Adds the gradient of the gathered ``keys`` back where they came from."""
    sizes = [s.stop - s.start for s in keys]
    for s, piece in zip(keys, part.split(sizes, dim=2), strict=True):
        total[:, :, s] += piece
