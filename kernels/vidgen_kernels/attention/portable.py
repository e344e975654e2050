"""The attention engine on a CPU: PyTorch's fused attention on chunks of query rows.

Neighbouring rows that see the same keys (a frame, a set) go through one call on just those keys,
without a mask. Shorter runs of rows are joined to chunks of at least `MIN_ROWS` rows, so that the
products stay long. Only such a chunk needs a mask, [rows, keys]. Memory is O(MIN_ROWS x T), never
T x T.

This calls the operators beneath `torch.nn.functional.scaled_dot_product_attention`, which return
the lse. Given the lse, the backward need not repeat the forward.
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
    rows: slice
    keys: list[slice]  # every key that some row of the chunk sees, in order
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

    ``begin``, ``end`` are int32 [I, B or 1, Tq]. With ``order`` [B or 1, Tq] they belong to the
    queries in that order, which are then selected one chunk at a time.
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
    # p = exp(s - lse) must be 0 for a row that sees nothing: s is -inf there, so lse may be any
    # finite number, but not -inf.
    lse = lse.masked_fill(lse == float("-inf"), 0.0)
    for chunk in _chunks(begin, end, q.dtype):
        do_, q_, out_, lse_ = (_get(x, chunk.rows, order) for x in (do, q, out, lse))
        dlse_ = None if dlse is None else _get(dlse, chunk.rows, order)
        dq_ = _attend_backward(do_, dlse_, q_, k, v, out_, lse_, dk, dv, chunk, softmax_scale)
        _put(dq, chunk.rows, order, dq_)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def set_attention_fwd(q, k, v, order_q, order_k, begin, end, softmax_scale):
    """`interval_attention_fwd` of tokens sorted by their orders; results in the order of q."""
    k, v = select_tokens(k, order_k), select_tokens(v, order_k)
    return interval_attention_fwd(q, k, v, begin, end, softmax_scale, order_q)


def set_attention_bwd(do, dlse, q, k, v, out, lse, order_q, order_k, begin, end, softmax_scale):
    """`interval_attention_bwd` of tokens sorted by their orders; results in those of q and k."""
    k, v = select_tokens(k, order_k), select_tokens(v, order_k)
    dq, dk, dv = interval_attention_bwd(
        do, dlse, q, k, v, out, lse, begin, end, softmax_scale, order_q
    )
    del k, v  # frees their memory for the gradients below
    back = order_k.argsort(dim=-1)
    dk = select_tokens(dk, back)
    return dq, dk, select_tokens(dv, back)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, chunk: Chunk, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse`` of the rows of a chunk, all heads."""
    if not chunk.keys or q.shape[1] == 0:  # no heads, as on a rank that was given none
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
    """``dq`` of the rows of a chunk; adds their share of ``dk`` and ``dv`` to these."""
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
    """Tokens ``rows``, of the tokens in ``order`` if there is one."""
    return x[:, :, rows] if order is None else select_tokens(x, order[:, rows])


def _put(out: Tensor, rows: slice, order: Tensor | None, x: Tensor) -> None:
    """Writes what `_get` reads."""
    if order is None:
        out[:, :, rows] = x
    else:
        put_tokens(out, order[:, rows], x)


def _with_dlse_columns(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, dlse: Tensor
) -> list[Tensor]:
    """Two more head dims that turn delta = do . out into do . out - dlse and change nothing else.

    do gets ones and out gets -dlse, as a rounded value and its remainder, so that low precision
    loses nothing; q, k and v get zeros, so s and do . v stay.
    """
    high = -dlse.to(out.dtype)
    low = (-dlse - high).to(out.dtype)
    padded = [F.pad(do, (0, 2), value=1.0), *(F.pad(x, (0, 2)) for x in (q, k, v))]
    return [*padded, torch.cat([out, high[..., None], low[..., None]], dim=-1)]


def _head_groups(q: Tensor, k: Tensor) -> Iterator[slice]:
    """Query heads that read the key heads in order: all of them, or one of each group at a time."""
    group = q.shape[1] // k.shape[1]
    return (slice(g, None, group) for g in range(group))


def _join_groups(parts: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """Joins the parts of `_head_groups` to [B, H, ...]."""
    return parts[0] if len(parts) == 1 else torch.stack(parts, dim=2).flatten(1, 2)


def _chunks(begin: Tensor, end: Tensor, dtype: torch.dtype) -> Iterator[Chunk]:
    """Chunks that cover all rows: a long run of rows that see the same keys is one, the rows
    between two such runs are one or more."""
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
    if not keys or bool((n_seen == n_keys).all()):
        return Chunk(rows, keys, None)
    n_rows = begin.shape[-1]
    if bool((begin == begin[..., :1]).all() and (end == end[..., :1]).all()):
        begin, end = begin[..., :1], end[..., :1]  # a long run: all rows share one row of mask
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
    """Adds the gradient of the gathered ``keys`` to the rows they came from."""
    sizes = [s.stop - s.start for s in keys]
    for s, piece in zip(keys, part.split(sizes, dim=2), strict=True):
        total[:, :, s] += piece
