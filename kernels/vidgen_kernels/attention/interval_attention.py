"""Attention where every query sees at most three intervals of keys: forward, dQ, dK/dV.

    s_ij = softmax_scale * q_i . k_j            for j in the intervals of i, else -inf
    lse_i = log sum_j exp(s_ij)                 natural log, -inf for a row that sees nothing
    out_i = sum_j p_ij v_j,  p_ij = exp(s_ij - lse_i)
    delta_i = do_i . out_i - dlse_i
    ds_ij = p_ij (do_i . v_j - delta_i)
    dq_i = softmax_scale * sum_j ds_ij k_j      dk_j = softmax_scale * sum_i ds_ij q_i
    dv_j = sum_i p_ij do_i

Shapes: q, out, do, dq [B, H, Tq, D]; k, v, dk, dv [B, Hkv, Tk, D]; lse, dlse, delta [B, H, Tq].

The algorithm is FlashAttention-2 (arXiv 2307.08691) with intervals in place of its causal mask. A
program owns a tile of rows: BLOCK_M queries in forward and dQ, BLOCK_N keys in dK/dV. For each
interval it loops over tiles of the other side, from the smallest begin of its rows to the largest
end. The *main sweep* is the loop over the tiles that all rows see, from the largest begin to the
smallest end; it has no mask code. A second loop takes the ragged tiles before and after, with
masks. With frames of some hundred tokens nearly all tiles are in the main sweep.

dK/dV computes transposed scores [keys, queries] under the transposed intervals. So nothing is added
atomically, and gradients are bitwise repeatable. Exponentials are base 2: log2(e) is part of the
scale. In shape comments D stands for HEAD_DIM; such a tile is a tuple of blocks of columns
(`head_tiles.py`).

Used by Pyramid Flow (2410.05954), NOVA (2412.14169) and causal Wan models (CausVid 2412.07772,
Self-Forcing 2506.08009), and by the other public functions of this folder.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.front_door import prepare, resolve_scale
from ..common.jit import scalar
from ..common.launch import accumulator_dtype, architecture, dot_precision
from ..common.registration import Op, define_op, refuse_double_backward
from . import portable
from .configs import LaunchConfig, lookup
from .head_tiles import (
    add_product,
    block_widths,
    column_blocks,
    head_ptr,
    load_tile,
    scale_rows,
    scores,
    store_tile,
    sum_of_products,
    tile_ptrs,
    zero_tile,
)
from .intervals import IntervalMask

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Compiled once for all sizes: a KV cache grows with every step.
SIZES = ("n_heads", "n_kv_heads", "n_queries", "n_keys")


@triton.jit
def _load_rows(ptr, offs_t, n_tokens, MASK: tl.constexpr):
    """A number per row, [BLOCK]; 0 past ``n_tokens``: memory there may hold NaN, and 0 * NaN is
    NaN."""
    mask = offs_t < n_tokens if MASK else None
    return tl.load(ptr + offs_t, mask=mask, other=0.0 if MASK else None)


@triton.jit
def _load_interval(begin_ptr, end_ptr, offs_t, n_tokens):
    """The interval [begin, end) of each row, two [BLOCK]."""
    # rows past the end repeat the last row, which neither widens nor narrows the loops
    row = tl.minimum(offs_t, n_tokens - 1)
    return tl.load(begin_ptr + row), tl.load(end_ptr + row)


@triton.jit
def _sweep(begin, end, BLOCK: tl.constexpr):
    """The tiles that some row sees; tile t begins at ``first + t * BLOCK``, for 0 <= t < n_tiles.

    Tiles n_head <= t < n_head + n_full are the main sweep: all rows see all of their tokens.
    """
    first = tl.min(tl.where(begin < end, begin, 2147483647), 0)
    last = tl.max(end, 0)
    n_tiles = tl.cdiv(tl.maximum(last - first, 0), BLOCK)
    n_head = tl.cdiv(tl.maximum(tl.max(begin, 0) - first, 0), BLOCK)
    n_full = tl.maximum(tl.min(end, 0) - first - n_head * BLOCK, 0) // BLOCK
    return first, n_tiles, n_head, n_full


@triton.jit
def _is_inside(offs, begin, end):
    """[rows of begin and end, columns ``offs``]: whether the column is in the row's interval."""
    return (offs[None, :] >= begin[:, None]) & (offs[None, :] < end[:, None])


@triton.jit
def _fwd_tile(
    acc, l_i, m_i, q, k_ptrs, v_ptrs, stride_kt, stride_vt, start, offs_n, offs_d, n_keys,
    begin, end, scale,
    HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """One online-softmax step over the keys ``start + offs_n``.

    Updates acc [BLOCK_M, D], l_i [BLOCK_M] and m_i [BLOCK_M], which is in log2 units.
    """
    k_offset = start.to(tl.int64) * stride_kt
    # [BLOCK_N, D]
    k = load_tile(k_ptrs, k_offset, start + offs_n, n_keys, offs_d, HEAD_DIM, MASK)
    # [BLOCK_M, BLOCK_N]
    qk = scores(q, k, l_i.dtype, PRECISION)
    if MASK:
        qk = tl.where(_is_inside(start + offs_n, begin, end), qk, float("-inf"))
    # [BLOCK_M]
    m_new = tl.maximum(m_i, tl.max(qk, 1) * scale)
    # A row that has seen no key yet has m_new = -inf. Subtracting 0 instead gives exp2(-inf) = 0,
    # where -inf - -inf would be NaN.
    shift = tl.where(m_new == float("-inf"), 0.0, m_new) if MASK else m_new
    # [BLOCK_M, BLOCK_N]
    p = tl.exp2(qk * scale - shift[:, None])
    # [BLOCK_M]
    alpha = tl.exp2(m_i - shift)
    l_i = l_i * alpha + tl.sum(p, 1)
    v_offset = start.to(tl.int64) * stride_vt
    # [BLOCK_N, D]
    v = load_tile(v_ptrs, v_offset, start + offs_n, n_keys, offs_d, HEAD_DIM, MASK)
    # [BLOCK_M, D]
    acc = add_product(scale_rows(acc, alpha), p, v, l_i.dtype, PRECISION)
    return acc, l_i, m_new


@triton.jit
def _query_tile(pid, n_tiles_m, n_rep):
    """Query head, key head and tile of queries of program ``pid``; heads count over all batch rows.

    Tiles of a head are neighbours and share its K and V in L2. The last queries see the most
    keys and come first, so that no long program is left for the end.
    """
    head = pid // n_tiles_m
    return head, head // n_rep, n_tiles_m - 1 - pid % n_tiles_m


@triton.jit(do_not_specialize=SIZES)
def _interval_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, begin_ptr, end_ptr,
    # strides: (batch, head, token), and (interval, batch) of begin and end
    stride_q, stride_k, stride_v, stride_out, stride_table,
    n_heads, n_kv_heads, n_queries, n_keys,
    softmax_scale: tl.float64,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, LAST_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    INTERVALS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out and lse of a tile of queries."""
    n_tiles_m, n_rep = tl.cdiv(n_queries, BLOCK_M), n_heads // n_kv_heads
    head, kv_head, pid_m = _query_tile(tl.program_id(0), n_tiles_m, n_rep)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = column_blocks(HEAD_DIM, BLOCK_D, LAST_D)
    scale = scalar(softmax_scale, ACC) * LOG2E

    q_ptrs = tile_ptrs(q_ptr, head, n_heads, stride_q, offs_m, offs_d)
    k_ptrs = tile_ptrs(k_ptr, kv_head, n_kv_heads, stride_k, offs_n, offs_d)
    v_ptrs = tile_ptrs(v_ptr, kv_head, n_kv_heads, stride_v, offs_n, offs_d)
    table_offset = (head // n_heads).to(tl.int64) * stride_table[1]
    # [BLOCK_M, D]
    q = load_tile(q_ptrs, 0, offs_m, n_queries, offs_d, HEAD_DIM, True)

    acc = zero_tile(BLOCK_M, offs_d, ACC)
    l_i = tl.zeros([BLOCK_M], ACC)
    m_i = tl.full([BLOCK_M], float("-inf"), ACC)
    for i in range(INTERVALS):
        table = i * stride_table[0] + table_offset
        begin, end = _load_interval(begin_ptr + table, end_ptr + table, offs_m, n_queries)
        first, n_tiles, n_head, n_full = _sweep(begin, end, BLOCK_N)
        for t in range(n_tiles - n_full):  # ragged tiles, around the main sweep
            tile = tl.where(t < n_head, t, t + n_full)
            acc, l_i, m_i = _fwd_tile(
                acc, l_i, m_i, q, k_ptrs, v_ptrs, stride_k[2], stride_v[2],
                first + tile * BLOCK_N, offs_n, offs_d, n_keys,
                begin, end, scale, HEAD_DIM, PRECISION, True,
            )  # fmt: skip
        for t in range(n_full):  # main sweep
            acc, l_i, m_i = _fwd_tile(
                acc, l_i, m_i, q, k_ptrs, v_ptrs, stride_k[2], stride_v[2],
                first + (n_head + t) * BLOCK_N, offs_n, offs_d, n_keys,
                begin, end, scale, HEAD_DIM, PRECISION, False,
            )  # fmt: skip

    is_empty = l_i == 0.0  # rows that see nothing
    l_i = tl.where(is_empty, 1.0, l_i)
    lse = tl.where(is_empty, float("-inf"), m_i * LN2 + tl.log(l_i))
    out_ptrs = tile_ptrs(out_ptr, head, n_heads, stride_out, offs_m, offs_d)
    store_tile(out_ptrs, acc, 1.0 / l_i[:, None], offs_m, n_queries, offs_d, HEAD_DIM)
    tl.store(lse_ptr + head.to(tl.int64) * n_queries + offs_m, lse, mask=offs_m < n_queries)


@triton.jit
def _dq_tile(
    dq, q, do, lse2, delta, k_ptrs, v_ptrs, stride_kt, stride_vt, start, offs_n, offs_d, n_keys,
    begin, end, scale,
    HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Adds what the keys ``start + offs_n`` contribute to dq [BLOCK_M, D]."""
    k_offset, v_offset = start.to(tl.int64) * stride_kt, start.to(tl.int64) * stride_vt
    # [BLOCK_N, D]
    k = load_tile(k_ptrs, k_offset, start + offs_n, n_keys, offs_d, HEAD_DIM, MASK)
    v = load_tile(v_ptrs, v_offset, start + offs_n, n_keys, offs_d, HEAD_DIM, MASK)
    # [BLOCK_M, BLOCK_N]
    qk = scores(q, k, delta.dtype, PRECISION)
    p = tl.exp2(qk * scale - lse2[:, None])
    if MASK:
        p = tl.where(_is_inside(start + offs_n, begin, end), p, 0.0)
    ds = p * (scores(do, v, delta.dtype, PRECISION) - delta[:, None])
    # [BLOCK_M, D]
    return add_product(dq, ds, k, delta.dtype, PRECISION)


@triton.jit(do_not_specialize=SIZES)
def _interval_attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, do_ptr, dq_ptr, lse_ptr, dlse_ptr, lse2_ptr, delta_ptr,
    begin_ptr, end_ptr,
    # strides: (batch, head, token), and (interval, batch) of begin and end
    stride_q, stride_k, stride_v, stride_out, stride_do, stride_dq, stride_dlse, stride_table,
    n_heads, n_kv_heads, n_queries, n_keys,
    softmax_scale: tl.float64,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, LAST_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    INTERVALS: tl.constexpr, HAS_DLSE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of a tile of queries. Also writes lse in log2 units and delta, which dK/dV reads."""
    n_tiles_m, n_rep = tl.cdiv(n_queries, BLOCK_M), n_heads // n_kv_heads
    head, kv_head, pid_m = _query_tile(tl.program_id(0), n_tiles_m, n_rep)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = column_blocks(HEAD_DIM, BLOCK_D, LAST_D)
    scale = scalar(softmax_scale, ACC) * LOG2E

    # do, out and q: [BLOCK_M, D]; delta and lse2: [BLOCK_M]
    do_ptrs = tile_ptrs(do_ptr, head, n_heads, stride_do, offs_m, offs_d)
    do = load_tile(do_ptrs, 0, offs_m, n_queries, offs_d, HEAD_DIM, True)
    out_ptrs = tile_ptrs(out_ptr, head, n_heads, stride_out, offs_m, offs_d)
    out = load_tile(out_ptrs, 0, offs_m, n_queries, offs_d, HEAD_DIM, True)
    delta = sum_of_products(do, out, ACC)
    row = head.to(tl.int64) * n_queries + offs_m
    if HAS_DLSE:
        dlse_ptrs = (
            head_ptr(dlse_ptr, head, n_heads, stride_dlse) + offs_m.to(tl.int64) * stride_dlse[2]
        )
        delta -= tl.load(dlse_ptrs, mask=offs_m < n_queries, other=0.0)
    lse2 = tl.load(lse_ptr + row, mask=offs_m < n_queries, other=0.0) * LOG2E
    tl.store(delta_ptr + row, delta, mask=offs_m < n_queries)
    tl.store(lse2_ptr + row, lse2, mask=offs_m < n_queries)

    q_ptrs = tile_ptrs(q_ptr, head, n_heads, stride_q, offs_m, offs_d)
    q = load_tile(q_ptrs, 0, offs_m, n_queries, offs_d, HEAD_DIM, True)
    k_ptrs = tile_ptrs(k_ptr, kv_head, n_kv_heads, stride_k, offs_n, offs_d)
    v_ptrs = tile_ptrs(v_ptr, kv_head, n_kv_heads, stride_v, offs_n, offs_d)
    table_offset = (head // n_heads).to(tl.int64) * stride_table[1]

    dq = zero_tile(BLOCK_M, offs_d, ACC)
    for i in range(INTERVALS):
        table = i * stride_table[0] + table_offset
        begin, end = _load_interval(begin_ptr + table, end_ptr + table, offs_m, n_queries)
        first, n_tiles, n_head, n_full = _sweep(begin, end, BLOCK_N)
        for t in range(n_tiles - n_full):  # ragged tiles
            tile = tl.where(t < n_head, t, t + n_full)
            dq = _dq_tile(
                dq, q, do, lse2, delta, k_ptrs, v_ptrs, stride_k[2], stride_v[2],
                first + tile * BLOCK_N, offs_n, offs_d, n_keys,
                begin, end, scale, HEAD_DIM, PRECISION, True,
            )  # fmt: skip
        for t in range(n_full):  # main sweep
            dq = _dq_tile(
                dq, q, do, lse2, delta, k_ptrs, v_ptrs, stride_k[2], stride_v[2],
                first + (n_head + t) * BLOCK_N, offs_n, offs_d, n_keys,
                begin, end, scale, HEAD_DIM, PRECISION, False,
            )  # fmt: skip

    dq_ptrs = tile_ptrs(dq_ptr, head, n_heads, stride_dq, offs_m, offs_d)
    scale = scalar(softmax_scale, ACC)
    store_tile(dq_ptrs, dq, scale, offs_m, n_queries, offs_d, HEAD_DIM)


@triton.jit
def _dkdv_tile(
    dk, dv, k, v, q_ptrs, do_ptrs, lse2_ptr, delta_ptr, stride_qt, stride_dot,
    start, offs_m, offs_d, n_queries, begin, end, scale,
    HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Adds what the queries ``start + offs_m`` contribute to dk and dv [BLOCK_N, D]."""
    query = start + offs_m
    q_offset, do_offset = start.to(tl.int64) * stride_qt, start.to(tl.int64) * stride_dot
    # [BLOCK_M, D]
    q = load_tile(q_ptrs, q_offset, query, n_queries, offs_d, HEAD_DIM, MASK)
    do = load_tile(do_ptrs, do_offset, query, n_queries, offs_d, HEAD_DIM, MASK)
    # [BLOCK_M]
    lse2 = _load_rows(lse2_ptr, query, n_queries, MASK)
    delta = _load_rows(delta_ptr, query, n_queries, MASK)
    # [BLOCK_N, BLOCK_M]
    kq = scores(k, q, delta.dtype, PRECISION)
    p = tl.exp2(kq * scale - lse2[None, :])
    if MASK:
        p = tl.where(_is_inside(query, begin, end), p, 0.0)
    # [BLOCK_N, D]
    dv = add_product(dv, p, do, delta.dtype, PRECISION)
    # [BLOCK_N, BLOCK_M]
    ds = p * (scores(v, do, delta.dtype, PRECISION) - delta[None, :])
    # [BLOCK_N, D]
    dk = add_product(dk, ds, q, delta.dtype, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=SIZES)
def _interval_attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, lse2_ptr, delta_ptr, begin_ptr, end_ptr,
    # strides: (batch, head, token), and (interval, batch) of begin and end
    stride_q, stride_k, stride_v, stride_do, stride_dk, stride_dv, stride_table,
    n_heads, n_kv_heads, n_queries, n_keys,
    softmax_scale: tl.float64,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, LAST_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr, INTERVALS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of a tile of keys, summed over the query heads that share it."""
    n_tiles_n = tl.cdiv(n_keys, BLOCK_N)
    pid = tl.program_id(0)
    kv_head = pid // n_tiles_n
    pid_n = pid % n_tiles_n  # the first keys are seen by the most queries and come first
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = column_blocks(HEAD_DIM, BLOCK_D, LAST_D)
    scale = scalar(softmax_scale, ACC) * LOG2E

    k_ptrs = tile_ptrs(k_ptr, kv_head, n_kv_heads, stride_k, offs_n, offs_d)
    v_ptrs = tile_ptrs(v_ptr, kv_head, n_kv_heads, stride_v, offs_n, offs_d)
    # [BLOCK_N, D]
    k = load_tile(k_ptrs, 0, offs_n, n_keys, offs_d, HEAD_DIM, True)
    v = load_tile(v_ptrs, 0, offs_n, n_keys, offs_d, HEAD_DIM, True)
    table_offset = (kv_head // n_kv_heads).to(tl.int64) * stride_table[1]

    dk = zero_tile(BLOCK_N, offs_d, ACC)
    dv = zero_tile(BLOCK_N, offs_d, ACC)
    for g in range(GROUP):
        head = kv_head * GROUP + g
        q_ptrs = tile_ptrs(q_ptr, head, n_heads, stride_q, offs_m, offs_d)
        do_ptrs = tile_ptrs(do_ptr, head, n_heads, stride_do, offs_m, offs_d)
        row_offset = head.to(tl.int64) * n_queries
        for i in range(INTERVALS):
            table = i * stride_table[0] + table_offset
            begin, end = _load_interval(begin_ptr + table, end_ptr + table, offs_n, n_keys)
            first, n_tiles, n_head, n_full = _sweep(begin, end, BLOCK_M)
            for t in range(n_tiles - n_full):  # ragged tiles
                tile = tl.where(t < n_head, t, t + n_full)
                dk, dv = _dkdv_tile(
                    dk, dv, k, v, q_ptrs, do_ptrs, lse2_ptr + row_offset, delta_ptr + row_offset,
                    stride_q[2], stride_do[2], first + tile * BLOCK_M, offs_m, offs_d,
                    n_queries, begin, end, scale, HEAD_DIM, PRECISION, True,
                )  # fmt: skip
            for t in range(n_full):  # main sweep
                dk, dv = _dkdv_tile(
                    dk, dv, k, v, q_ptrs, do_ptrs, lse2_ptr + row_offset, delta_ptr + row_offset,
                    stride_q[2], stride_do[2], first + (n_head + t) * BLOCK_M, offs_m, offs_d,
                    n_queries, begin, end, scale, HEAD_DIM, PRECISION, False,
                )  # fmt: skip

    dk_ptrs = tile_ptrs(dk_ptr, kv_head, n_kv_heads, stride_dk, offs_n, offs_d)
    dv_ptrs = tile_ptrs(dv_ptr, kv_head, n_kv_heads, stride_dv, offs_n, offs_d)
    scale = scalar(softmax_scale, ACC)
    store_tile(dk_ptrs, dk, scale, offs_n, n_keys, offs_d, HEAD_DIM)
    store_tile(dv_ptrs, dv, 1.0, offs_n, n_keys, offs_d, HEAD_DIM)


def _launch_fwd(
    q: Tensor, k: Tensor, v: Tensor, begin: Tensor, end: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = _empty_fwd(q)
    config = lookup("fwd", q.shape[-1], q.dtype, architecture(q))
    grid = (triton.cdiv(q.shape[2], config.block_m) * q.shape[0] * q.shape[1],)
    if grid[0]:
        _interval_attention_fwd_kernel[grid](
            q, k, v, out, lse, begin, end,
            *(x.stride()[:3] for x in (q, k, v, out)),
            _table_strides(begin),
            *_sizes(q, k), softmax_scale,
            **_constants(q, begin, config), **config.kwargs(),
        )  # fmt: skip
    return out, lse


def _launch_bwd(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    q_begin: Tensor, q_end: Tensor, k_begin: Tensor, k_end: Tensor, softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = _empty_bwd(do, dlse, q, k, v)
    do = do if do.stride(-1) == 1 else do.contiguous()  # e.g. the expanded gradient of a sum
    lse2, delta = torch.empty_like(lse), torch.empty_like(lse)
    config = lookup("dq", q.shape[-1], q.dtype, architecture(q))
    grid = (triton.cdiv(q.shape[2], config.block_m) * q.shape[0] * q.shape[1],)
    if grid[0]:
        _interval_attention_bwd_dq_kernel[grid](
            q, k, v, out, do, dq, lse, dlse, lse2, delta, q_begin, q_end,
            *(x.stride()[:3] for x in (q, k, v, out, do, dq, lse if dlse is None else dlse)),
            _table_strides(q_begin),
            *_sizes(q, k), softmax_scale, HAS_DLSE=dlse is not None,
            **_constants(q, q_begin, config), **config.kwargs(),
        )  # fmt: skip
    config = lookup("dkdv", q.shape[-1], q.dtype, architecture(q))
    grid = (triton.cdiv(k.shape[2], config.block_n) * k.shape[0] * k.shape[1],)
    if grid[0]:
        _interval_attention_bwd_dkdv_kernel[grid](
            q, k, v, do, dk, dv, lse2, delta, k_begin, k_end,
            *(x.stride()[:3] for x in (q, k, v, do, dk, dv)),
            _table_strides(k_begin),
            *_sizes(q, k), softmax_scale, GROUP=q.shape[1] // k.shape[1],
            **_constants(q, k_begin, config), **config.kwargs(),
        )  # fmt: skip
    return dq, dk, dv


def _sizes(q: Tensor, k: Tensor) -> tuple[int, int, int, int]:
    return q.shape[1], k.shape[1], q.shape[2], k.shape[2]


def _table_strides(begin: Tensor) -> tuple[int, int]:
    """Strides of an interval table ``[I, B or 1, T]`` over intervals and over batch rows."""
    _, n_batch, n_tokens = begin.shape
    return n_batch * n_tokens, n_tokens if n_batch > 1 else 0


def _constants(q: Tensor, begin: Tensor, config: LaunchConfig) -> dict:
    return {
        "HEAD_DIM": q.shape[-1],
        **block_widths(q.shape[-1], config.block_d),
        "INTERVALS": len(begin),
        "ACC": accumulator_dtype(q.dtype),
        "PRECISION": dot_precision(q.dtype),
    }


def _empty_fwd(q: Tensor, *_) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.promote_types(q.dtype, torch.float32)  # fp64 for fp64
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=lse_dtype)


def _empty_bwd(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


# Both operators take the interval tables of queries and of keys, so that autograd can save what the
# backward needs. Only the dK/dV kernel reads the tables of keys.


def _forward(
    q: Tensor, k: Tensor, v: Tensor,
    q_begin: Tensor, q_end: Tensor, k_begin: Tensor, k_end: Tensor, softmax_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _launch_fwd(q, k, v, q_begin, q_end, softmax_scale)


def _portable_fwd(q, k, v, q_begin, q_end, k_begin, k_end, softmax_scale):
    return portable.interval_attention_fwd(q, k, v, q_begin, q_end, softmax_scale)


def _portable_bwd(do, dlse, q, k, v, out, lse, q_begin, q_end, k_begin, k_end, softmax_scale):
    return portable.interval_attention_bwd(
        do, dlse, q, k, v, out, lse, q_begin, q_end, softmax_scale
    )


forward_op = define_op("interval_attention_fwd", _forward, _portable_fwd, _empty_fwd)
backward_op = define_op("interval_attention_bwd", _launch_bwd, _portable_bwd, _empty_bwd)


def register_autograd(forward_op: Op, backward_op: Op) -> None:
    """Joins two operators: ``forward_op(q, k, v, *tables, softmax_scale) -> (out, lse)`` and
    ``backward_op(do, dlse, q, k, v, out, lse, *tables, softmax_scale) -> (dq, dk, dv)``.
    """

    def setup_context(ctx, inputs, output):
        *tensors, ctx.softmax_scale = inputs
        ctx.save_for_backward(*output, *tensors)
        ctx.set_materialize_grads(False)

    def backward(ctx, do, dlse):
        out, lse, q, k, v, *tables = ctx.saved_tensors
        do = torch.zeros_like(out) if do is None else do
        # A row that sees nothing has a constant lse of -inf and passes no gradient on. The incoming
        # one may be NaN, e.g. from logaddexp of two such rows.
        dlse = None if dlse is None else dlse.masked_fill(lse == float("-inf"), 0.0)
        grads = backward_op(do, dlse, q, k, v, out, lse, *tables, ctx.softmax_scale)
        return *grads, *[None] * (len(tables) + 1)

    forward_op.register_autograd(backward, setup_context=setup_context)
    refuse_double_backward(backward_op)


register_autograd(forward_op, backward_op)


def interval_attention(
    q: Tensor,  # [B, H, Tq, D]
    k: Tensor,  # [B, Hkv, Tk, D]
    v: Tensor,  # [B, Hkv, Tk, D]
    mask: IntervalMask,
    *,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact softmax attention over the keys that ``mask`` lets each query see.

    Args:
        q, k, v: bf16, fp16, fp32 or fp64, any strides, D up to 256;
            H a multiple of Hkv. Under autocast they are cast to its dtype, except fp64.
        mask: built for these token counts, on the device of q.
        softmax_scale: default ``1 / sqrt(D)``.
        return_lse: also return the log-sum-exp of the scaled scores.

    Returns:
        out ``[B, H, Tq, D]`` in the dtype of q; 0 for rows that see nothing.
        lse ``[B, H, Tq]``, natural log, fp32 (fp64 for fp64 inputs), differentiable; -inf for rows
        that see nothing.

    Raises:
        ValueError: shapes, dtypes, devices or mask sizes that do not fit.
        NotImplementedError: double backward, forward-mode derivatives.
    """
    q, k, v = prepare(q, k, v)
    if not isinstance(mask, IntervalMask):
        raise ValueError(f"mask: expected an IntervalMask, got {type(mask).__name__}")
    if mask.device != q.device:
        raise ValueError(f"mask: expected device {q.device} as q has, got {mask.device}")
    if mask.batch_size not in (1, q.shape[0]):
        raise ValueError(f"mask: expected batch 1 or {q.shape[0]}, got {mask.batch_size}")
    intervals = mask.intervals(q.shape[2], k.shape[2])
    q, scale = resolve_scale(q, softmax_scale)
    out, lse = forward_op(q, k, v, *intervals, scale)
    return (out, lse) if return_lse else out
