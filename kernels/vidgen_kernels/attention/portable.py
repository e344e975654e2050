"""Interval attention on a CPU: PyTorch's fused attention on chunks of query rows.

Used by `interval_attention.py` and `set_masked.py` for CPU tensors; formulas are in the former.

A long run of rows that see the same keys (a frame, a set) is one chunk: one call on just those
keys. It needs no mask, unless keys in between are unseen or batch rows differ. Shorter runs are
joined to chunks of at least `MIN_ROWS` rows, so that matrix products stay large. Their rows see
different keys, so they need a mask [rows, keys]. Memory is O(MIN_ROWS x T), never T x T.

This calls the operators beneath `torch.nn.functional.scaled_dot_product_attention` because they
return the lse, and a backward that takes the lse does not repeat the forward.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .tokens import empty_selected, put_tokens, select_tokens

MIN_ROWS = 256

_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Chunk(NamedTuple):
    rows: slice  # of the queries
    keys: list[slice]  # disjoint, in order; they hold every key that some row sees
    mask: Tensor | None  # [B or 1, 1, rows, keys] added to the scores; None: all rows see all keys


def interval_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    begin: Tensor,
    end: Tensor,
    softmax_scale: float,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``out`` like q and ``lse`` [B, H, Tq].

    ``begin`` and ``end`` are int32 [I, B or 1, Tq]. With ``order`` [B or 1, Tq], their row i
    belongs to query ``order[i]``. Queries are then selected chunk by chunk, not all at once.
    """
    out = torch.empty_like(q) if order is None else empty_selected(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    is_empty = (begin >= end).all(dim=0)[:, None]  # [B or 1, 1, Tq]
    for chunk in _chunks(begin, end, q.dtype):
        out_chunk, lse_chunk = _attend(_get(q, chunk.rows, order), k, v, chunk, softmax_scale)
        lse_chunk = lse_chunk.masked_fill(is_empty[..., chunk.rows], float("-inf"))
        _put(out, chunk.rows, order, out_chunk)
        _put(lse, chunk.rows, order, lse_chunk)
    return out, lse


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
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dq, dk, dv`` like q, k, v. Sums over chunks and heads are kept in fp32 or wider."""
    dq = torch.empty_like(q) if order is None else empty_selected(q)
    sum_dtype = torch.promote_types(q.dtype, torch.float32)
    dk, dv = (torch.zeros_like(x, dtype=sum_dtype) for x in (k, v))
    # A row that sees nothing has s = lse = -inf, and -inf - -inf is NaN. With any finite lse,
    # p = exp(s - lse) is 0.
    lse = lse.masked_fill(lse == float("-inf"), 0.0)
    for chunk in _chunks(begin, end, q.dtype):
        do_, q_, out_, lse_ = (_get(x, chunk.rows, order) for x in (do, q, out, lse))
        dlse_ = None if dlse is None else _get(dlse, chunk.rows, order)
        dq_ = _attend_backward(do_, dlse_, q_, k, v, out_, lse_, dk, dv, chunk, softmax_scale)
        _put(dq, chunk.rows, order, dq_)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def set_attention_fwd(q, k, v, order_q, order_k, begin, end, softmax_scale):
    """`interval_attention_fwd` of queries and keys sorted by ``order_q`` and ``order_k``.

    The intervals are those of the sorted tokens; results are in the original order of q.
    """
    k, v = select_tokens(k, order_k), select_tokens(v, order_k)
    return interval_attention_fwd(q, k, v, begin, end, softmax_scale, order_q)


def set_attention_bwd(do, dlse, q, k, v, out, lse, order_q, order_k, begin, end, softmax_scale):
    """The backward of `set_attention_fwd`; gradients are in the original order of q and k."""
    k, v = select_tokens(k, order_k), select_tokens(v, order_k)
    dq, dk, dv = interval_attention_bwd(
        do, dlse, q, k, v, out, lse, begin, end, softmax_scale, order_q
    )
    del k, v  # frees memory for the gradients in original order
    back = order_k.argsort(dim=-1)
    dk = select_tokens(dk, back)
    return dq, dk, select_tokens(dv, back)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, chunk: Chunk, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse`` of a chunk, for q [B, H, rows, D] and all of k, v [B, Hkv, Tk, D]."""
    if not chunk.keys or q.shape[1] == 0:  # no heads, e.g. on a distributed rank without any
        return torch.zeros_like(q), q.new_zeros(q.shape[:3])
    k, v = (_take(x, chunk.keys) for x in (k, v))
    parts = [
        _attention(q[:, heads], k, v, attn_mask=chunk.mask, scale=softmax_scale)
        for heads in _head_groups(q, k)
    ]
    out, lse = (_join_groups(x) for x in zip(*parts, strict=True))
    return out, lse


def _attend_backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dk: Tensor,
    dv: Tensor,
    chunk: Chunk,
    softmax_scale: float,
) -> Tensor:
    """``dq`` of the rows of a chunk. Adds their contributions to ``dk`` and ``dv`` in place."""
    if not chunk.keys or q.shape[1] == 0:
        return torch.zeros_like(q)
    k, v = (_take(x, chunk.keys) for x in (k, v))
    dq = []
    for heads in _head_groups(q, k):
        operands = [do[:, heads], q[:, heads], k, v, out[:, heads]]
        if dlse is not None:
            operands = _with_dlse_columns(*operands, dlse[:, heads])
        gradients = _attention_backward(
            *operands, lse[:, heads], 0.0, False, attn_mask=chunk.mask, scale=softmax_scale
        )
        dq_group, dk_group, dv_group = (x[..., : q.shape[-1]] for x in gradients)
        dq.append(dq_group)
        _add(dk, dk_group, chunk.keys)
        _add(dv, dv_group, chunk.keys)
    return _join_groups(dq)


def _get(x: Tensor, rows: slice, order: Tensor | None) -> Tensor:
    """Tokens ``rows`` of ``x``, or tokens ``order[:, rows]`` if there is an order."""
    return x[:, :, rows] if order is None else select_tokens(x, order[:, rows])


def _put(out: Tensor, rows: slice, order: Tensor | None, x: Tensor) -> None:
    """Writes ``x`` to the tokens of ``out`` that `_get` would read."""
    if order is None:
        out[:, :, rows] = x
    else:
        put_tokens(out, order[:, rows], x)


def _with_dlse_columns(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, dlse: Tensor
) -> list[Tensor]:
    """do, q, k, v, out with two more columns, which bring dlse into PyTorch's backward.

    PyTorch computes delta = do . out; the columns make it do . out - dlse. They are 1 in do, and in
    out they sum to -dlse: its value rounded to the dtype of out, and the remainder. They are 0 in
    q, k and v, so s and do . v do not change.
    """
    high = -dlse.to(out.dtype)
    low = (-dlse - high).to(out.dtype)
    padded = [F.pad(do, (0, 2), value=1.0), *(F.pad(x, (0, 2)) for x in (q, k, v))]
    return [*padded, torch.cat([out, high[..., None], low[..., None]], dim=-1)]


def _head_groups(q: Tensor, k: Tensor) -> Iterator[slice]:
    """Slices of the query heads, each with one query head for every key head, in order.

    There is one slice if q and k have equally many heads, else H / Hkv of them.
    """
    group = q.shape[1] // k.shape[1]
    return (slice(g, None, group) for g in range(group))


def _join_groups(parts: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """Joins the results of all `_head_groups` to [B, H, ...]."""
    return parts[0] if len(parts) == 1 else torch.stack(parts, dim=2).flatten(1, 2)


def _chunks(begin: Tensor, end: Tensor, dtype: torch.dtype) -> Iterator[Chunk]:
    """Chunks that cover all rows.

    A run of at least `MIN_ROWS` rows with equal intervals is a chunk. The rows between such runs
    are cut into chunks of `MIN_ROWS` rows or more; if there are fewer, they are one chunk.
    """
    n_rows = begin.shape[-1]
    changes = ((begin.diff(dim=-1) != 0) | (end.diff(dim=-1) != 0)).flatten(0, 1).any(dim=0)
    edges = F.pad(changes.nonzero()[:, 0] + 1, (1, 1))
    edges[-1] = n_rows
    first = (edges.diff() >= MIN_ROWS).nonzero()[:, 0]
    long_runs = zip(edges[first].tolist(), edges[first + 1].tolist(), strict=True)
    start = 0
    for lo, hi in [*long_runs, (n_rows, n_rows)]:
        n_pieces = max(1, (lo - start) // MIN_ROWS)
        cuts = [start + (lo - start) * i // n_pieces for i in range(n_pieces + 1)]
        for rows in (slice(*pair) for pair in itertools.pairwise([*cuts, hi])):
            if rows.start < rows.stop:
                yield _chunk(rows, begin[..., rows], end[..., rows], dtype)
        start = hi


def _chunk(rows: slice, begin: Tensor, end: Tensor, dtype: torch.dtype) -> Chunk:
    """The chunk ``rows``, whose intervals are ``begin``, ``end`` [I, B or 1, rows]."""
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
    if not keys or bool((n_seen == n_keys).all()):
        return Chunk(rows, keys, None)
    n_rows = begin.shape[-1]
    if bool((begin == begin[..., :1]).all() and (end == end[..., :1]).all()):
        begin, end = begin[..., :1], end[..., :1]  # equal rows: build one and expand it
    key = torch.cat(
        [torch.arange(s.start, s.stop, dtype=begin.dtype, device=begin.device) for s in keys]
    )
    hidden = torch.ones(*begin.shape[1:], n_keys, dtype=torch.bool, device=begin.device)
    for i in range(len(begin)):
        hidden &= (key < begin[i, ..., None]) | (key >= end[i, ..., None])
    mask = torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, float("-inf"))
    return Chunk(rows, keys, mask[:, None].expand(-1, -1, n_rows, -1))


def _take(x: Tensor, keys: list[slice]) -> Tensor:
    if len(keys) == 1:
        return x[:, :, keys[0]]
    return torch.cat([x[:, :, s] for s in keys], dim=2)


def _add(total: Tensor, part: Tensor, keys: list[slice]) -> None:
    """Adds ``part``, the gradient of what `_take` selected, to these ``keys`` of ``total``."""
    sizes = [s.stop - s.start for s in keys]
    for s, piece in zip(keys, part.split(sizes, dim=2), strict=True):
        total[:, :, s] += piece
