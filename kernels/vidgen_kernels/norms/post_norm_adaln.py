"""Gated residual around a norm, and the adaptive norm that reads it: forward, backward.

    n   = LN(f) * weight + bias               gate, weight and bias may be absent
    out = x + gate * n                        rounded to the dtype of x before the norm reads it
    a   = LN(out) * (1 + scale) + shift

    dshift = da,   dscale = da * xhat_out
    dout'  = dout + rstd_out * (d - mean(d) - xhat_out * mean(d * xhat_out)),  d = da * (1 + scale)
    dx     = dout',   dgate = dout' * n,   dn = dout' * gate
    df     = rstd_f * (d - mean(d) - xhat_f * mean(d * xhat_f)),  d = dn * weight
    dweight = sum of dn * xhat_f,   dbias = sum of dn

Shapes: x, f, gate, scale, shift, out, a [B, T, D]; weight, bias [D]. A gate, scale or shift that
tokens share is an expanded view.

A program owns consecutive rows of one batch row. It writes its sums of dn and dn * xhat_f once, and
PyTorch adds them, without atomics. Saved for backward are f, out, and the mean and rstd of the rows
of both.

NOVA (arXiv 2412.14169): the denoising MLP, from the layers of one block to those of the next.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.front_door import autocast_dtype, contiguous_rows, refuse_tangents
from ..common.jit import normalize_backward, statistics
from ..common.launch import architecture
from ..common.registration import define_op, refuse_double_backward
from . import post_norm_adaln_portable as portable
from .arguments import (
    as_vectors,
    check_affine,
    check_eps,
    check_like,
    check_rows,
    expand_vectors,
)
from .configs import ROW_WISE, lookup
from .operands import flat, none_if_absent
from .post_norm_adaln_operands import Backward, Forward, empty_bwd, empty_fwd
from .rows import (
    SIZES,
    constants,
    count_programs,
    load_columns,
    load_rows,
    load_stats,
    rows_of,
    rows_of_program,
    store_rows,
    store_stats,
)

MAX_ROW = max(ROW_WISE["post_norm_adaln_bwd"])


@triton.jit(do_not_specialize=SIZES)
def _post_norm_adaln_fwd_kernel(
    x_rows, f_rows, gate_rows, scale_rows, shift_rows, weight_ptr, bias_ptr, out_ptr, a_ptr,
    stats_ptr,  # [4, B, T]: mean and rstd of f, then of out
    n_batch, n_tokens, eps: tl.float64, next_eps: tl.float64,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    batch, first, end = rows_of_program(pid, n_tokens, ROWS, TILES)  # pyright: ignore
    cols = tl.arange(0, BLOCK_D)[None, :]
    is_col = cols < D
    out_stats_ptr = stats_ptr + 2 * n_batch * n_tokens
    weight = load_columns(weight_ptr, cols, is_col, 1.0, ACC)
    bias = load_columns(bias_ptr, cols, is_col, 0.0, ACC)
    for start in range(first, end, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        at = (batch, row, cols, (row < end) & is_col)
        f = load_rows(f_rows, at, ACC)
        x = load_rows(x_rows, at, ACC)
        mean, rstd = statistics(f, is_col, D, eps, False)  # pyright: ignore
        store_stats(stats_ptr, mean, rstd, batch, row, end, n_batch, n_tokens)
        n = (f - mean) * rstd * weight + bias
        if gate_rows is not None:
            n *= load_rows(gate_rows, at, ACC)
        out = tl.where(is_col, x + n, 0.0).to(out_ptr.dtype.element_ty).to(ACC)
        store_rows(out_ptr, out, at, n_tokens, D)
        mean, rstd = statistics(out, is_col, D, next_eps, False)  # pyright: ignore
        store_stats(out_stats_ptr, mean, rstd, batch, row, end, n_batch, n_tokens)
        scale = load_rows(scale_rows, at, ACC)
        shift = load_rows(shift_rows, at, ACC)
        store_rows(a_ptr, (out - mean) * rstd * (1 + scale) + shift, at, n_tokens, D)


@triton.jit(do_not_specialize=SIZES)
def _post_norm_adaln_bwd_kernel(
    dout_rows, da_rows, out_rows, f_rows, stats_ptr, gate_rows, scale_rows, weight_ptr, bias_ptr,
    dx_ptr, df_ptr, dgate_ptr, dscale_ptr,
    partials_ptr,  # [programs, 2, D]: sums of dn and dn * xhat
    n_batch, n_tokens,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    batch, first, end = rows_of_program(pid, n_tokens, ROWS, TILES)  # pyright: ignore
    cols = tl.arange(0, BLOCK_D)[None, :]
    is_col = cols < D
    out_stats_ptr = stats_ptr + 2 * n_batch * n_tokens
    weight = load_columns(weight_ptr, cols, is_col, 1.0, ACC)
    if dgate_ptr is not None:
        bias = load_columns(bias_ptr, cols, is_col, 0.0, ACC)
    sum_dn = tl.zeros([ROWS, BLOCK_D], ACC)
    sum_dn_xhat = tl.zeros([ROWS, BLOCK_D], ACC)
    for start in range(first, end, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        at = (batch, row, cols, (row < end) & is_col)
        dx = load_rows(dout_rows, at, ACC)
        if da_rows is not None:
            da = load_rows(da_rows, at, ACC)
            out = load_rows(out_rows, at, ACC)
            mean, rstd = load_stats(out_stats_ptr, batch, row, end, n_batch, n_tokens)  # pyright: ignore
            xhat = tl.where(is_col, (out - mean) * rstd, 0.0)
            if dscale_ptr is not None:
                store_rows(dscale_ptr, da * xhat, at, n_tokens, D)
            da *= 1 + load_rows(scale_rows, at, ACC)
            dx += normalize_backward(da, xhat, rstd, is_col, D, False)
            if dx_ptr is not None:
                store_rows(dx_ptr, dx, at, n_tokens, D)
        if f_rows is not None:
            f = load_rows(f_rows, at, ACC)
            mean, rstd = load_stats(stats_ptr, batch, row, end, n_batch, n_tokens)  # pyright: ignore
            xhat = tl.where(is_col, (f - mean) * rstd, 0.0)
            if dgate_ptr is not None:
                store_rows(dgate_ptr, dx * (xhat * weight + bias), at, n_tokens, D)
            dn = dx
            if gate_rows is not None:
                dn *= load_rows(gate_rows, at, ACC)
            if partials_ptr is not None:
                sum_dn += dn
                sum_dn_xhat += dn * xhat
            if df_ptr is not None:
                df = normalize_backward(dn * weight, xhat, rstd, is_col, D, False)
                store_rows(df_ptr, df, at, n_tokens, D)
    if partials_ptr is not None:
        partials_ptr += pid.to(tl.int64) * 2 * D + cols
        tl.store(partials_ptr, tl.sum(sum_dn, 0, keep_dims=True), mask=is_col)
        tl.store(partials_ptr + D, tl.sum(sum_dn_xhat, 0, keep_dims=True), mask=is_col)


def _launch_fwd(args: Forward) -> tuple[Tensor, Tensor, Tensor]:
    """What `empty_fwd` allocates, filled."""
    results = empty_fwd(args)
    x, f = args.x, args.f
    n_batch, n_tokens, n_cols = x.shape
    config = lookup("post_norm_adaln_fwd", n_cols, architecture(x))
    n_programs = n_batch * count_programs(n_tokens, config)
    if n_programs:
        _post_norm_adaln_fwd_kernel[(n_programs,)](
            *map(rows_of, (x, f, args.gate, args.scale, args.shift)), args.weight, args.bias,
            *results, n_batch, n_tokens, args.eps, args.next_eps,
            **constants(n_cols, torch.promote_types(x.dtype, f.dtype), config),
        )  # fmt: skip
    return results


def _launch_bwd(args: Backward) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `empty_bwd` allocates, filled."""
    results = empty_bwd(args)
    dx, df, dgate, dscale, sums = map(none_if_absent, results)
    out, f = args.out, args.f
    n_batch, n_tokens, n_cols = f.shape
    config = lookup("post_norm_adaln_bwd", n_cols, architecture(f))
    n_programs = n_batch * count_programs(n_tokens, config)
    partials = None if sums is None else sums.new_empty(n_programs, 2, n_cols)
    if n_programs:
        dout, da = contiguous_rows(args.dout), contiguous_rows(args.da)
        f_if_read = f if args.need_f or args.need_gate or args.need_sums else None
        _post_norm_adaln_bwd_kernel[(n_programs,)](
            *map(rows_of, (dout, da, out, f_if_read)), args.stats,
            rows_of(args.gate), rows_of(args.scale), args.weight, args.bias,
            dx, df, dgate, dscale, partials, n_batch, n_tokens,
            **constants(n_cols, torch.promote_types(out.dtype, f.dtype), config),
        )  # fmt: skip
    if partials is not None:
        torch.sum(partials, dim=0, out=sums)
    return results


forward_op = define_op(
    "post_norm_adaln_fwd", flat(_launch_fwd), flat(portable.post_norm_adaln_fwd), flat(empty_fwd)
)
backward_op = define_op(
    "post_norm_adaln_bwd", flat(_launch_bwd), flat(portable.post_norm_adaln_bwd), flat(empty_bwd)
)


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
            none_if_absent, backward_op(dout, da, out, f, stats, gate, scale, weight, bias, *needs)
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
        x, f: bf16, fp16, fp32 or fp64, any strides.
        gate, scale, shift: [D], [B, D], [B, 1, D], or [B, T, D] for a vector per token; any
            floating dtype, read in place. Their gradients are computed per token, then summed.
        weight, bias: any floating dtype.
        eps, next_eps: added to the variance of f, and of out.

    Returns:
        out: a new contiguous tensor in the dtype of x, rounded to it before the norm reads it.
        a: in the dtype of x, or the one that autocast asks for.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit.
        NotImplementedError: double backward, forward-mode derivatives.
    """
    check_rows(x, MAX_ROW)
    check_like("f", f, x)
    check_affine(weight, bias, x)
    check_eps(eps)
    check_eps(next_eps, "next_eps")
    x, f = contiguous_rows(x), contiguous_rows(f)
    weight, bias = contiguous_rows(weight), contiguous_rows(bias)
    gate = None if gate is None else _per_token("gate", gate, x)
    scale, shift = _per_token("scale", scale, x), _per_token("shift", shift, x)
    refuse_tangents(x, f, gate, scale, shift, weight, bias)
    out, a, _ = forward_op(
        x, f, gate, scale, shift, weight, bias, float(eps), float(next_eps), autocast_dtype(x)
    )
    return out, a
