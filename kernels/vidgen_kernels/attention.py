"""The front doors for video models: frames that see the past, sets that see earlier sets."""

import torch
from torch import Tensor

from .interval_attention import autocast, backward_op, check_qkv, forward_op, interval_attention
from .interval_attention import resolve_scale
from .intervals import BlockLengths, IntervalMask, check_ranks, sorted_ranks


def block_causal_attention(
    q: Tensor,  # [B, H, T, D]
    k: Tensor,  # [B, Hkv, T, D]
    v: Tensor,  # [B, Hkv, T, D]
    block_lengths: BlockLengths,
    *,
    window: int | None = None,
    sink_blocks: int = 0,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention between blocks of tokens (frames): block i sees block j iff j <= i.

    Text that all frames see and that sees frame 0 is part of block 0 (Pyramid Flow, NOVA):
    ``[text + n0, n1, n2, ...]``; text that sees only itself is a block of its own.

    Args:
        block_lengths: tokens per block, summing to T: ints, or an int tensor ``[N]`` on the device of
            q (then a new layout never recompiles anything).
        window: a block sees only the last ``window`` blocks, itself included ...
        sink_blocks: ... and these first ones.

    The rest, returns and errors: `interval_attention`. A mask built once with
    `IntervalMask.block_causal` saves the metadata work of every further layer.
    """
    mask = IntervalMask.block_causal(
        block_lengths, window=window, sink_blocks=sink_blocks, device=q.device
    )
    return interval_attention(q, k, v, mask, softmax_scale=softmax_scale, return_lse=return_lse)


def set_masked_attention(
    q: Tensor,  # [B, H, Tq, D]
    k: Tensor,  # [B, Hkv, Tk, D]
    v: Tensor,  # [B, Hkv, Tk, D]
    rank_q: Tensor,  # [Tq] or [B, Tq]
    rank_k: Tensor | None = None,  # [Tk] or [B, Tk]
    *,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention between sets of tokens in any order: query i sees key j iff rank_k[j] <= rank_q[i].

    Sorted by rank this is the block-causal staircase, so tokens are sorted on the way in and put back
    on the way out. A model that keeps its tokens sorted saves both with `IntervalMask.from_ranks`.

    Args:
        rank_q, rank_k: integers, any order and values; ``rank_k`` defaults to ``rank_q``. A rank below
            all keys' gives a query that sees nothing (output 0), one above all queries' an unseen key.

    The rest, returns and errors: `interval_attention`.
    """
    q, k, v = autocast(q, k, v)
    check_qkv(q, k, v)
    ranks_q = check_ranks("rank_q", rank_q)
    ranks_k = ranks_q if rank_k is None else check_ranks("rank_k", rank_k)
    for name, ranks, x in (("rank_q", ranks_q, q), ("rank_k", ranks_k, k)):
        n_batch, _, n_tokens, _ = x.shape
        if len(ranks) not in (1, n_batch) or ranks.shape[1] != n_tokens:
            expected = f"[{n_tokens}] or [{n_batch}, {n_tokens}]"
            raise ValueError(f"{name}: expected shape {expected}, got {list(ranks.shape)}")
        if ranks.device != q.device:
            raise ValueError(f"{name}: expected device {q.device} as q has, got {ranks.device}")
    sorted_q, order_q = ranks_q.sort(dim=-1, stable=True)
    sorted_k, order_k = (sorted_q, order_q) if rank_k is None else ranks_k.sort(dim=-1, stable=True)
    intervals = sorted_ranks(sorted_q, sorted_k).intervals(q.shape[2], k.shape[2])
    q, scale = resolve_scale(q, softmax_scale)
    out, lse = _SetMaskedAttention.apply(q, k, v, order_q, order_k, scale, *intervals)
    return (out, lse) if return_lse else out


class _SetMaskedAttention(torch.autograd.Function):
    """Sort, attend, put back. Keeps the unsorted tensors, which the caller holds anyway, and sorts
    again in the backward: a copy costs less than holding four sorted tensors per layer."""

    @staticmethod
    def forward(ctx, q, k, v, order_q, order_k, softmax_scale, *intervals):
        sorted_qkv = _sort(q, order_q), _sort(k, order_k), _sort(v, order_k)
        out, lse = forward_op(*sorted_qkv, *intervals, softmax_scale)
        back_q = order_q.argsort(dim=-1)
        out, lse = _sort(out, back_q), _sort(lse, back_q)
        ctx.save_for_backward(q, k, v, out, lse, order_q, order_k, *intervals)
        ctx.softmax_scale = softmax_scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, do, dlse):
        q, k, v, out, lse, order_q, order_k, *intervals = ctx.saved_tensors
        do = torch.zeros_like(out) if do is None else do
        dlse = None if dlse is None else _sort(dlse, order_q)
        by_query = (_sort(x, order_q) for x in (do, q, out, lse))
        do, q, out, lse = by_query
        k, v = _sort(k, order_k), _sort(v, order_k)
        dq, dk, dv = backward_op(do, dlse, q, k, v, out, lse, *intervals, ctx.softmax_scale)
        del do, q, out, k, v  # the gradients are put back in the memory that these held
        back_q, back_k = order_q.argsort(dim=-1), order_k.argsort(dim=-1)
        dq = _sort(dq, back_q)
        dk = _sort(dk, back_k)
        dv = _sort(dv, back_k)
        return dq, dk, dv, *[None] * 7


def _sort(x: Tensor, order: Tensor) -> Tensor:
    """Tokens of x ``[B, H, T, ...]`` in ``order`` ``[B or 1, T]``."""
    if len(order) == 1:
        return x.index_select(2, order[0])
    index = order[:, None].reshape(len(order), 1, -1, *[1] * (x.ndim - 3))
    return x.gather(2, index.expand(x.shape))
