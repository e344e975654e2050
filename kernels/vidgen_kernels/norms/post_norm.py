"""Residual around a norm, as in post-norm transformers: forward, backward.

    xhat = (f - mean(f)) * rsqrt(var(f) + eps)   "layer"
    xhat = f * rsqrt(mean(f^2) + eps)            "rms"
    out  = x + gate * (xhat * weight + bias)     what is None is left out

    dx    = do
    df    = rstd * (dxhat - mean(dxhat) - xhat * mean(dxhat * xhat)),  dxhat = do * gate * weight
    dgate = do * (xhat * weight + bias), summed over the tokens that share a gate
    dweight = sum of do * gate * xhat,   dbias = sum of do * gate

Shapes: x, f, out [B, T, D]; weight, bias [D]; gate [B, 1, D], or [B, T, D] of a gate per token.

A program owns consecutive rows of one batch row. Where its rows share a gate it is folded into
weight and bias, and backward needs two sums over columns alone, A1 = sum of do and A2 = sum of
do * xhat: dgate = weight * A2 + bias * A1; over the batch, dweight = sum of gate * A2 and dbias =
sum of gate * A1. Programs write their sums once and PyTorch adds them: no atomics. Saved are f and
the mean and rstd of each row.

NOVA (arXiv 2412.14169): ``x + LN(f)`` in its transformers, with a gate per token in its denoising
MLP, where the gate is a third of a projection and read in place.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.front_door import check_last_dim, check_tensor, refuse_tangents
from ..common.jit import normalize_backward, statistics
from ..common.launch import accumulator_dtype, architecture
from ..common.registration import define_op, refuse_double_backward
from . import post_norm_portable as portable
from .configs import ROW_WISE, lookup
from .post_norm_portable import empty_bwd, empty_fwd
from .residual_norm import NORMS, as_vectors, check_columns, check_like, expand_vectors
from .residual_norm_kernels import given
from .rows import load_columns, load_rows, store_rows

MAX_ROW = max(ROW_WISE["post_norm_bwd"])
SIZES = ("n_batch", "n_tokens")  # compiled once for all of them


@triton.jit
def rows_of_program(pid, n_tokens, ROWS: tl.constexpr, TILES: tl.constexpr):
    """Batch row, first row of it and end."""
    n_chunks = tl.cdiv(n_tokens, ROWS * TILES)
    first = (pid % n_chunks) * ROWS * TILES
    return (pid // n_chunks).to(tl.int64), first, tl.minimum(first + ROWS * TILES, n_tokens)


@triton.jit(do_not_specialize=SIZES)
def _post_norm_fwd_kernel(
    x_ptr, f_ptr, gate_ptr, weight_ptr, bias_ptr, out_ptr,
    stats_ptr,  # [2, B, T]: mean, rstd
    stride_x, stride_f, stride_gate,  # (batch, token)
    n_batch, n_tokens, eps: tl.float64,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
    IS_RMS: tl.constexpr, PER_TOKEN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    batch, first, end = rows_of_program(pid, n_tokens, ROWS, TILES)  # pyright: ignore
    cols = tl.arange(0, BLOCK_D)[None, :]
    is_col = cols < D
    weight = load_columns(weight_ptr, cols, is_col, 1.0, ACC)
    bias = load_columns(bias_ptr, cols, is_col, 0.0, ACC)
    if gate_ptr is not None and not PER_TOKEN:
        gate = load_columns(gate_ptr + batch * stride_gate[0], cols, is_col, 1.0, ACC)
        weight, bias = weight * gate, bias * gate
    for start in range(first, end, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        mask = (row < end) & is_col
        f = load_rows(f_ptr, stride_f, batch, row, cols, mask, ACC)
        x = load_rows(x_ptr, stride_x, batch, row, cols, mask, ACC)
        mean, rstd = statistics(f, is_col, D, eps, IS_RMS)  # pyright: ignore
        stats_ptrs = stats_ptr + batch * n_tokens + row
        tl.store(stats_ptrs, mean, mask=row < end)
        tl.store(stats_ptrs + n_batch * n_tokens, rstd, mask=row < end)
        n = (f - mean) * rstd * weight + bias
        if PER_TOKEN:
            n *= load_rows(gate_ptr, stride_gate, batch, row, cols, mask, ACC)
        store_rows(out_ptr, x + n, batch, row, cols, mask, n_tokens, D)


@triton.jit(do_not_specialize=SIZES)
def _post_norm_bwd_kernel(
    do_ptr, f_ptr, stats_ptr, gate_ptr, weight_ptr, bias_ptr, df_ptr, dgate_ptr,
    partials_ptr,  # [programs, 2, D]: sums of dn and dn * xhat
    stride_do, stride_f, stride_gate,
    n_batch, n_tokens,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
    IS_RMS: tl.constexpr, PER_TOKEN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dn is do times the gate of the token, or do where the rows of a program share their gate."""
    pid = tl.program_id(0)
    batch, first, end = rows_of_program(pid, n_tokens, ROWS, TILES)  # pyright: ignore
    cols = tl.arange(0, BLOCK_D)[None, :]
    is_col = cols < D
    weight = load_columns(weight_ptr, cols, is_col, 1.0, ACC)
    if dgate_ptr is not None:
        bias = load_columns(bias_ptr, cols, is_col, 0.0, ACC)
    gated_weight = weight
    if gate_ptr is not None and not PER_TOKEN:
        gate = load_columns(gate_ptr + batch * stride_gate[0], cols, is_col, 1.0, ACC)
        gated_weight = weight * gate
    sum_dn = tl.zeros([ROWS, BLOCK_D], ACC)
    sum_dn_xhat = tl.zeros([ROWS, BLOCK_D], ACC)
    for start in range(first, end, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        mask = (row < end) & is_col
        f = load_rows(f_ptr, stride_f, batch, row, cols, mask, ACC)
        dn = load_rows(do_ptr, stride_do, batch, row, cols, mask, ACC)
        stats_ptrs = stats_ptr + batch * n_tokens + row
        mean = tl.load(stats_ptrs, mask=row < end, other=0.0)
        rstd = tl.load(stats_ptrs + n_batch * n_tokens, mask=row < end, other=0.0)
        xhat = tl.where(is_col, (f - mean) * rstd, 0.0)
        if PER_TOKEN:
            if dgate_ptr is not None:
                dgate = dn * (xhat * weight + bias)
                store_rows(dgate_ptr, dgate, batch, row, cols, mask, n_tokens, D)
            dn *= load_rows(gate_ptr, stride_gate, batch, row, cols, mask, ACC)
        if partials_ptr is not None:
            sum_dn += dn
            sum_dn_xhat += dn * xhat
        if df_ptr is not None:
            df = normalize_backward(dn * gated_weight, xhat, rstd, is_col, D, IS_RMS)
            store_rows(df_ptr, df, batch, row, cols, mask, n_tokens, D)
    if partials_ptr is not None:
        partials_ptr += pid.to(tl.int64) * 2 * D + cols
        tl.store(partials_ptr, tl.sum(sum_dn, 0, keep_dims=True), mask=is_col)
        tl.store(partials_ptr + D, tl.sum(sum_dn_xhat, 0, keep_dims=True), mask=is_col)


def _launch_fwd(
    x: Tensor, f: Tensor, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    norm: str, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out, and mean and rstd [2, B, T]."""
    out, stats = empty_fwd(x, f)
    config = lookup("post_norm_fwd", x.shape[2], architecture(x))
    n_programs = len(x) * -(-x.shape[1] // (config.rows * config.tiles))
    if n_programs:
        _post_norm_fwd_kernel[(n_programs,)](
            x, f, gate, weight, bias, out, stats, *map(strides_of, (x, f, gate)),
            len(x), x.shape[1], eps,
            **_constants(x, f, gate, norm), **config.kwargs(),
        )  # fmt: skip
    return out, stats


def _launch_bwd(
    do: Tensor, f: Tensor, stats: Tensor, gate: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, norm: str, need_f: bool, need_gate: bool, need_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """df, dgate of a gate per token, and the sums [B, 2, D] of dn and dn * xhat.

    What is not needed is an empty vector.
    """
    df, dgate, sums = empty_bwd(
        do, f, stats, gate, weight, bias, norm, need_f, need_gate, need_sums
    )  # fmt: skip
    do = do if do.stride(-1) == 1 else do.contiguous()  # e.g. the expanded gradient of a sum
    config = lookup("post_norm_bwd", f.shape[2], architecture(f))
    n_chunks = -(-f.shape[1] // (config.rows * config.tiles))
    partials = sums.new_empty(len(f), n_chunks, 2, f.shape[2]) if need_sums else None
    if len(f) * n_chunks:
        _post_norm_bwd_kernel[(len(f) * n_chunks,)](
            do, f, stats, gate, weight, bias, given(df), given(dgate), partials,
            *map(strides_of, (do, f, gate)), len(f), f.shape[1],
            **_constants(do, f, gate, norm), **config.kwargs(),
        )  # fmt: skip
    if partials is not None:
        torch.sum(partials, dim=1, out=sums)
    return df, dgate, sums


def strides_of(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if x is None else x.stride()[:2]


def _constants(x: Tensor, f: Tensor, gate: Tensor | None, norm: str) -> dict:
    return {
        "D": x.shape[2],
        "BLOCK_D": triton.next_power_of_2(x.shape[2]),
        "IS_RMS": norm == "rms",
        "PER_TOKEN": portable.is_per_token(gate),
        "ACC": accumulator_dtype(torch.promote_types(x.dtype, f.dtype)),
    }


def _fake_fwd(x, f, gate, weight, bias, norm, eps):
    return empty_fwd(x, f)


forward_op = define_op(
    "post_norm_residual_fwd", _launch_fwd, portable.post_norm_residual_fwd, _fake_fwd
)
backward_op = define_op(
    "post_norm_residual_bwd", _launch_bwd, portable.post_norm_residual_bwd, empty_bwd
)


def _setup_context(ctx, inputs, output) -> None:
    _, f, gate, weight, bias, ctx.norm, _ = inputs
    ctx.save_for_backward(f, output[1], gate, weight, bias)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, do, _):
    f, stats, gate, weight, bias = ctx.saved_tensors
    _, need_f, need_gate, need_weight, need_bias, *_ = ctx.needs_input_grad
    if not (need_f or need_gate or need_weight or need_bias):
        return do, *[None] * 6
    is_per_token = portable.is_per_token(gate)
    need_sums = need_weight or need_bias or (need_gate and not is_per_token)
    df, dgate, sums = backward_op(
        do, f, stats, gate, weight, bias, ctx.norm,
        need_f, need_gate and is_per_token, need_sums,
    )  # fmt: skip
    dweight, dbias = None, None
    if need_sums:
        if gate is not None and not is_per_token:
            if need_gate:
                sum_dn, sum_dn_xhat = sums[:, :1], sums[:, 1:]  # [B, 1, D]
                dgate = sum_dn_xhat if weight is None else sum_dn_xhat * weight
                dgate = dgate if bias is None else dgate + sum_dn * bias
            sums = sums * gate
        sum_dbias, sum_dweight = sums.sum(dim=0)
        dweight = None if weight is None else sum_dweight.to(weight.dtype)
        dbias = None if bias is None else sum_dbias.to(bias.dtype)
    dgate = dgate.to(gate.dtype) if gate is not None and need_gate else None
    return do, df if need_f else None, dgate, dweight, dbias, None, None


forward_op.register_autograd(_backward, setup_context=_setup_context)
refuse_double_backward(backward_op)


def post_norm_residual(
    x: Tensor,  # [B, T, D] or [T, D]
    f: Tensor,  # as x
    *,
    gate: Tensor | None = None,
    weight: Tensor | None = None,  # [D]
    bias: Tensor | None = None,  # [D]
    norm: str = "layer",
    eps: float = 1e-5,
) -> Tensor:
    """``x + gate * (norm(f) * weight + bias)``.

    Args:
        x, f: bf16, fp16, fp32 or fp64, of one shape, any strides with a contiguous last dim.
        gate: [D], [B, D], [B, 1, D] or, per token, [B, T, D]; beside x [T, D]: [D] or [T, D]. Any
            floating dtype, read in place.
        weight, bias: any floating dtype.
        norm: "layer" or "rms"; statistics in fp32 (fp64 for fp64).
        eps: added to the mean square.

    Returns:
        A new contiguous tensor of the shape and dtype of x.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit.
        NotImplementedError: double backward, forward-mode derivatives.
    """
    check_tensor("x", x)
    if x.ndim not in (2, 3) or not 1 <= x.shape[-1] <= MAX_ROW:
        expected = f"[B, T, D] or [T, D] with D of 1 to {MAX_ROW}"
        raise ValueError(f"x: expected shape {expected}, got {list(x.shape)}")
    check_last_dim("x", x)
    check_like("f", f, x)
    n_cols = x.shape[-1]
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            check_columns(name, vector, x)
    if norm not in NORMS:
        raise ValueError(f"norm: expected one of {', '.join(NORMS)}, got {norm!r}")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps: expected a finite number above 0, got {eps}")
    rows, f_rows = (x[None], f[None]) if x.ndim == 2 else (x, f)
    if gate is not None:
        check_tensor("gate", gate, ("x", x))
        if x.ndim == 2:
            if gate.shape not in ((n_cols,), x.shape):
                expected = f"[{n_cols}] or {list(x.shape)}"
                raise ValueError(f"gate: expected shape {expected}, got {list(gate.shape)}")
            gate = gate if gate.ndim == 1 else gate[None]
        gate = as_vectors("gate", gate, rows, rows.shape[1])
        gate = expand_vectors(gate, rows.shape[0], gate.shape[1])
    refuse_tangents(x, f, gate, weight, bias)
    out, _ = forward_op(rows, f_rows, gate, weight, bias, norm, float(eps))
    return out[0] if x.ndim == 2 else out
