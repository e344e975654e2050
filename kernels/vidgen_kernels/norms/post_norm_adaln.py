"""Gated residual around a norm, and the adaptive norm that reads it: forward, backward.

    n   = LN(f) * weight + bias               what is None is left out
    out = x + gate * n                        rounded to the dtype of x before the norm reads it
    a   = LN(out) * (1 + scale) + shift       no weights

    dshift = da,   dscale = da * xhat_out
    dout'  = dout + rstd_out * (d - mean(d) - xhat_out * mean(d * xhat_out)),  d = da * (1 + scale)
    dx     = dout',   dgate = dout' * n,   dn = dout' * gate
    df     = rstd_f * (d - mean(d) - xhat_f * mean(d * xhat_f)),  d = dn * weight
    dweight = sum of dn * xhat_f,   dbias = sum of dn

Shapes: x, f, gate, scale, shift, out, a [B, T, D], the vectors expanded views where tokens share
them; weight, bias [D].

A program owns consecutive rows of one batch row, and writes its sums of dn and dn * xhat once;
PyTorch adds them: no atomics. Saved are f, out, and the mean and rstd of their rows.

NOVA (arXiv 2412.14169): the denoising MLP, from the layers of one block to those of the next.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.front_door import autocast_dtype, check_last_dim, check_tensor, refuse_tangents
from ..common.jit import normalize_backward, statistics
from ..common.launch import accumulator_dtype, architecture
from ..common.registration import define_op, refuse_double_backward
from . import post_norm_adaln_portable as portable
from .configs import ROW_WISE, lookup
from .post_norm import SIZES, rows_of_program, strides_of
from .post_norm_adaln_portable import empty_bwd, empty_fwd
from .residual_norm import as_vectors, check_columns, check_like, expand_vectors
from .residual_norm_kernels import given
from .rows import load_columns, load_rows, store_rows

MAX_ROW = max(ROW_WISE["post_norm_adaln_bwd"])


@triton.jit
def _store_stats(stats_ptr, mean, rstd, n_rows, row, end):
    tl.store(stats_ptr + row, mean, mask=row < end)
    tl.store(stats_ptr + n_rows + row, rstd, mask=row < end)


@triton.jit
def _load_xhat(ptr, stride, stats_ptr, n_rows, batch, row, end, cols, is_col, ACC: tl.constexpr):
    """Rows normalised again, 0 outside of the columns, and their rstd."""
    x = load_rows(ptr, stride, batch, row, cols, (row < end) & is_col, ACC)
    mean = tl.load(stats_ptr + row, mask=row < end, other=0.0)
    rstd = tl.load(stats_ptr + n_rows + row, mask=row < end, other=0.0)
    return tl.where(is_col, (x - mean) * rstd, 0.0), rstd


@triton.jit(do_not_specialize=SIZES)
def _post_norm_adaln_fwd_kernel(
    x_ptr, f_ptr, gate_ptr, scale_ptr, shift_ptr, weight_ptr, bias_ptr, out_ptr, a_ptr,
    stats_ptr,  # [4, B, T]: mean and rstd of f, then of out
    stride_x, stride_f, stride_gate, stride_scale, stride_shift,  # (batch, token)
    n_batch, n_tokens, eps: tl.float64, next_eps: tl.float64,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    batch, first, end = rows_of_program(pid, n_tokens, ROWS, TILES)  # pyright: ignore
    cols = tl.arange(0, BLOCK_D)[None, :]
    is_col = cols < D
    n_rows = n_batch * n_tokens
    stats_ptr += batch * n_tokens
    weight = load_columns(weight_ptr, cols, is_col, 1.0, ACC)
    bias = load_columns(bias_ptr, cols, is_col, 0.0, ACC)
    for start in range(first, end, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        mask = (row < end) & is_col
        f = load_rows(f_ptr, stride_f, batch, row, cols, mask, ACC)
        x = load_rows(x_ptr, stride_x, batch, row, cols, mask, ACC)
        mean, rstd = statistics(f, is_col, D, eps, False)  # pyright: ignore
        _store_stats(stats_ptr, mean, rstd, n_rows, row, end)
        n = (f - mean) * rstd * weight + bias
        if gate_ptr is not None:
            n *= load_rows(gate_ptr, stride_gate, batch, row, cols, mask, ACC)
        out = tl.where(is_col, x + n, 0.0).to(out_ptr.dtype.element_ty).to(ACC)
        store_rows(out_ptr, out, batch, row, cols, mask, n_tokens, D)
        mean, rstd = statistics(out, is_col, D, next_eps, False)  # pyright: ignore
        _store_stats(stats_ptr + 2 * n_rows, mean, rstd, n_rows, row, end)
        scale = load_rows(scale_ptr, stride_scale, batch, row, cols, mask, ACC)
        shift = load_rows(shift_ptr, stride_shift, batch, row, cols, mask, ACC)
        a = (out - mean) * rstd * (1 + scale) + shift
        store_rows(a_ptr, a, batch, row, cols, mask, n_tokens, D)


@triton.jit(do_not_specialize=SIZES)
def _post_norm_adaln_bwd_kernel(
    dout_ptr, da_ptr, out_ptr, f_ptr, stats_ptr, gate_ptr, scale_ptr, weight_ptr, bias_ptr,
    dx_ptr, df_ptr, dgate_ptr, dscale_ptr,
    partials_ptr,  # [programs, 2, D]: sums of dn and dn * xhat
    stride_dout, stride_da, stride_out, stride_f, stride_gate, stride_scale,
    n_batch, n_tokens,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    batch, first, end = rows_of_program(pid, n_tokens, ROWS, TILES)  # pyright: ignore
    cols = tl.arange(0, BLOCK_D)[None, :]
    is_col = cols < D
    n_rows = n_batch * n_tokens
    stats_ptr += batch * n_tokens
    weight = load_columns(weight_ptr, cols, is_col, 1.0, ACC)
    if dgate_ptr is not None:
        bias = load_columns(bias_ptr, cols, is_col, 0.0, ACC)
    sum_dn = tl.zeros([ROWS, BLOCK_D], ACC)
    sum_dn_xhat = tl.zeros([ROWS, BLOCK_D], ACC)
    for start in range(first, end, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        mask = (row < end) & is_col
        if dout_ptr is not None:
            dn = load_rows(dout_ptr, stride_dout, batch, row, cols, mask, ACC)
        else:
            dn = tl.zeros([ROWS, BLOCK_D], ACC)
        if da_ptr is not None:
            da = load_rows(da_ptr, stride_da, batch, row, cols, mask, ACC)
            xhat, rstd = _load_xhat(  # pyright: ignore
                out_ptr, stride_out, stats_ptr + 2 * n_rows, n_rows, batch, row, end, cols, is_col,
                ACC,
            )  # fmt: skip
            if dscale_ptr is not None:
                store_rows(dscale_ptr, da * xhat, batch, row, cols, mask, n_tokens, D)
            da *= 1 + load_rows(scale_ptr, stride_scale, batch, row, cols, mask, ACC)
            dn += normalize_backward(da, xhat, rstd, is_col, D, False)
            if dx_ptr is not None:
                store_rows(dx_ptr, dn, batch, row, cols, mask, n_tokens, D)
        if f_ptr is not None:
            xhat, rstd = _load_xhat(  # pyright: ignore
                f_ptr, stride_f, stats_ptr, n_rows, batch, row, end, cols, is_col, ACC
            )
            if dgate_ptr is not None:
                dgate = dn * (xhat * weight + bias)
                store_rows(dgate_ptr, dgate, batch, row, cols, mask, n_tokens, D)
            if gate_ptr is not None:
                dn *= load_rows(gate_ptr, stride_gate, batch, row, cols, mask, ACC)
            if partials_ptr is not None:
                sum_dn += dn
                sum_dn_xhat += dn * xhat
            if df_ptr is not None:
                df = normalize_backward(dn * weight, xhat, rstd, is_col, D, False)
                store_rows(df_ptr, df, batch, row, cols, mask, n_tokens, D)
    if partials_ptr is not None:
        partials_ptr += pid.to(tl.int64) * 2 * D + cols
        tl.store(partials_ptr, tl.sum(sum_dn, 0, keep_dims=True), mask=is_col)
        tl.store(partials_ptr + D, tl.sum(sum_dn_xhat, 0, keep_dims=True), mask=is_col)


def _launch_fwd(
    x: Tensor, f: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, weight: Tensor | None,
    bias: Tensor | None, eps: float, next_eps: float, a_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """out, a, and the mean and rstd of f and of out [4, B, T]."""
    out, a, stats = empty_fwd(x, f, a_dtype)
    config = lookup("post_norm_adaln_fwd", x.shape[2], architecture(x))
    n_programs = len(x) * -(-x.shape[1] // (config.rows * config.tiles))
    if n_programs:
        _post_norm_adaln_fwd_kernel[(n_programs,)](
            x, f, gate, scale, shift, weight, bias, out, a, stats,
            *map(strides_of, (x, f, gate, scale, shift)), len(x), x.shape[1], eps, next_eps,
            **_constants(x, f), **config.kwargs(),
        )  # fmt: skip
    return out, a, stats


def _launch_bwd(
    dout: Tensor | None, da: Tensor | None, out: Tensor, f: Tensor, stats: Tensor,
    gate: Tensor | None, scale: Tensor, weight: Tensor | None, bias: Tensor | None,
    need_x: bool, need_f: bool, need_gate: bool, need_scale: bool, need_sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, df, dgate, dscale, and the sums [2, D] of dn and dn * xhat.

    What is not needed is an empty vector.
    """
    dx, df, dgate, dscale, sums = empty_bwd(
        dout, da, out, f, stats, gate, scale, weight, bias,
        need_x, need_f, need_gate, need_scale, need_sums,
    )  # fmt: skip
    # e.g. the expanded gradient of a sum
    dout, da = (g if g is None or g.stride(-1) == 1 else g.contiguous() for g in (dout, da))
    config = lookup("post_norm_adaln_bwd", f.shape[2], architecture(f))
    n_programs = len(f) * -(-f.shape[1] // (config.rows * config.tiles))
    partials = sums.new_empty(n_programs, 2, f.shape[2]) if need_sums else None
    f_or_none = f if need_f or need_gate or need_sums else None
    if n_programs:
        _post_norm_adaln_bwd_kernel[(n_programs,)](
            dout, da, out, f_or_none, stats, gate, scale, weight, bias,
            *map(given, (dx, df, dgate, dscale)), partials,
            *map(strides_of, (dout, da, out, f, gate, scale)), len(f), f.shape[1],
            **_constants(out, f), **config.kwargs(),
        )  # fmt: skip
    if partials is not None:
        torch.sum(partials, dim=0, out=sums)
    return dx, df, dgate, dscale, sums


def _constants(x: Tensor, f: Tensor) -> dict:
    return {
        "D": x.shape[2],
        "BLOCK_D": triton.next_power_of_2(x.shape[2]),
        "ACC": accumulator_dtype(torch.promote_types(x.dtype, f.dtype)),
    }


def _fake_fwd(x, f, gate, scale, shift, weight, bias, eps, next_eps, a_dtype):
    return empty_fwd(x, f, a_dtype)


forward_op = define_op("post_norm_adaln_fwd", _launch_fwd, portable.post_norm_adaln_fwd, _fake_fwd)
backward_op = define_op("post_norm_adaln_bwd", _launch_bwd, portable.post_norm_adaln_bwd, empty_bwd)


def _setup_context(ctx, inputs, output) -> None:
    _, f, gate, scale, shift, weight, bias, *_ = inputs
    out, _, stats = output
    ctx.shift_dtype = shift.dtype
    ctx.save_for_backward(out, f, stats, gate, scale, weight, bias)
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, da, _):
    out, f, stats, gate, scale, weight, bias = ctx.saved_tensors
    need_x, need_f, need_gate, need_scale, need_shift, need_weight, need_bias, *_ = (
        ctx.needs_input_grad
    )
    if dout is None and da is None:
        return (None,) * 10
    needs = (
        need_x and da is not None,  # else dx is dout
        need_f,
        need_gate,
        need_scale and da is not None,
        need_weight or need_bias,
    )
    dx, df, dgate, dscale, sums = dout, None, None, None, None
    if any(needs):
        dx, df, dgate, dscale, sums = map(
            given, backward_op(dout, da, out, f, stats, gate, scale, weight, bias, *needs)
        )
        dx = dout if da is None else dx
    dshift = da.to(ctx.shift_dtype) if need_shift and da is not None else None
    dweight, dbias = None, None
    if sums is not None:
        dbias = sums[0].to(bias.dtype) if need_bias else None
        dweight = sums[1].to(weight.dtype) if need_weight else None
    return dx if need_x else None, df, dgate, dscale, dshift, dweight, dbias, *[None] * 3


forward_op.register_autograd(_backward, setup_context=_setup_context)
refuse_double_backward(backward_op)


def _per_token(name: str, v: Tensor, x: Tensor) -> Tensor:
    n_batch, n_tokens, _ = x.shape
    return expand_vectors(as_vectors(name, v, x, n_tokens), n_batch, n_tokens)


def post_norm_adaln(
    x: Tensor,  # [B, T, D]
    f: Tensor,  # [B, T, D]
    *,
    gate: Tensor | None = None,
    weight: Tensor | None = None,  # [D]
    bias: Tensor | None = None,  # [D]
    scale: Tensor,
    shift: Tensor,
    eps: float = 1e-5,
    next_eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """``out = x + gate * (LN(f) * weight + bias)`` and ``a = LN(out) * (1 + scale) + shift``.

    Args:
        x, f: bf16, fp16, fp32 or fp64, any strides with a contiguous last dim.
        gate, scale, shift: [D], [B, D], [B, 1, D], or [B, T, D] for a vector per token; any
            floating dtype, read in place. Gradients are made per token, and then summed.
        weight, bias: any floating dtype.
        eps, next_eps: added to the variance of f, and of out.

    Returns:
        out: a new contiguous tensor in the dtype of x, rounded to it before the norm reads it.
        a: in the dtype of x, or that which autocast asks for.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit.
        NotImplementedError: double backward, forward-mode derivatives.
    """
    check_tensor("x", x)
    if x.ndim != 3 or not 1 <= x.shape[2] <= MAX_ROW:
        expected = f"[B, T, D] with D of 1 to {MAX_ROW}"
        raise ValueError(f"x: expected shape {expected}, got {list(x.shape)}")
    check_last_dim("x", x)
    check_like("f", f, x)
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            check_columns(name, vector, x)
    for name, value in (("eps", eps), ("next_eps", next_eps)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a finite number above 0, got {value}")
    gate = None if gate is None else _per_token("gate", gate, x)
    scale, shift = _per_token("scale", scale, x), _per_token("shift", shift, x)
    refuse_tangents(x, f, gate, scale, shift, weight, bias)
    out, a, _ = forward_op(
        x, f, gate, scale, shift, weight, bias, float(eps), float(next_eps), autocast_dtype(x)
    )
    return out, a
