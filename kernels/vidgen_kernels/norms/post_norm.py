"""Residual around a norm, as in post-norm transformers: forward, backward.

    xhat = (f - mean(f)) * rsqrt(var(f) + eps)   "layer"
    xhat = f * rsqrt(mean(f^2) + eps)            "rms"
    out  = x + gate * (xhat * weight + bias)     gate, weight and bias may be absent

    dx    = do
    df    = rstd * (dxhat - mean(dxhat) - xhat * mean(dxhat * xhat)),  dxhat = do * gate * weight
    dgate = do * (xhat * weight + bias), summed over the tokens that share a gate
    dweight = sum of do * gate * xhat,   dbias = sum of do * gate

Shapes: x, f, out [B, T, D]; weight, bias [D]; gate [B, 1, D], or [B, T, D] with a gate per token.

A program owns consecutive rows of one batch row. If they share a gate, it is folded into weight
and bias, and backward needs two sums over the rows only, A1 = sum of do and A2 = sum of do * xhat:
dgate = weight * A2 + bias * A1, and, summed over the batch, dweight = sum of gate * A2 and dbias =
sum of gate * A1. Each program writes its sums once and PyTorch adds them, without atomics. Saved
for backward are f and the mean and rstd of each row.

NOVA (arXiv 2412.14169): ``x + LN(f)`` in its transformers, with a gate per token in its denoising
MLP. That gate is a third of a projection, and read in place.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.front_door import check_tensor, contiguous_rows, refuse_tangents
from ..common.jit import normalize_backward, statistics
from ..common.launch import architecture
from ..common.registration import define_op, refuse_double_backward
from . import post_norm_portable as portable
from .arguments import (
    as_vectors,
    check_affine,
    check_eps,
    check_like,
    check_norm,
    check_rows,
    expand_vectors,
)
from .configs import ROW_WISE, lookup
from .operands import flat, none_if_absent
from .post_norm_operands import Backward, Forward, empty_bwd, empty_fwd, is_per_token
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

MAX_ROW = max(ROW_WISE["post_norm_bwd"])


@triton.jit(do_not_specialize=SIZES)
def _post_norm_fwd_kernel(
    x_rows, f_rows, gate_rows, weight_ptr, bias_ptr, out_ptr,
    stats_ptr,  # [2, B, T]: mean, rstd
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
    if gate_rows is not None and not PER_TOKEN:
        gate = load_columns(gate_rows[0] + batch * gate_rows[1], cols, is_col, 1.0, ACC)
        weight, bias = weight * gate, bias * gate
    for start in range(first, end, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        at = (batch, row, cols, (row < end) & is_col)
        f = load_rows(f_rows, at, ACC)
        x = load_rows(x_rows, at, ACC)
        mean, rstd = statistics(f, is_col, D, eps, IS_RMS)  # pyright: ignore
        store_stats(stats_ptr, mean, rstd, batch, row, end, n_batch, n_tokens)
        n = (f - mean) * rstd * weight + bias
        if PER_TOKEN:
            n *= load_rows(gate_rows, at, ACC)
        store_rows(out_ptr, x + n, at, n_tokens, D)


@triton.jit(do_not_specialize=SIZES)
def _post_norm_bwd_kernel(
    do_rows, f_rows, gate_rows, stats_ptr, weight_ptr, bias_ptr, df_ptr, dgate_ptr,
    partials_ptr,  # [programs, 2, D]: sums of dn and dn * xhat
    n_batch, n_tokens,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
    IS_RMS: tl.constexpr, PER_TOKEN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dn is do * gate if each token has its gate, else do."""
    pid = tl.program_id(0)
    batch, first, end = rows_of_program(pid, n_tokens, ROWS, TILES)  # pyright: ignore
    cols = tl.arange(0, BLOCK_D)[None, :]
    is_col = cols < D
    weight = load_columns(weight_ptr, cols, is_col, 1.0, ACC)
    if dgate_ptr is not None:
        bias = load_columns(bias_ptr, cols, is_col, 0.0, ACC)
    gated_weight = weight
    if gate_rows is not None and not PER_TOKEN:
        gate = load_columns(gate_rows[0] + batch * gate_rows[1], cols, is_col, 1.0, ACC)
        gated_weight = weight * gate
    sum_dn = tl.zeros([ROWS, BLOCK_D], ACC)
    sum_dn_xhat = tl.zeros([ROWS, BLOCK_D], ACC)
    for start in range(first, end, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        at = (batch, row, cols, (row < end) & is_col)
        f = load_rows(f_rows, at, ACC)
        dn = load_rows(do_rows, at, ACC)
        mean, rstd = load_stats(stats_ptr, batch, row, end, n_batch, n_tokens)  # pyright: ignore
        xhat = tl.where(is_col, (f - mean) * rstd, 0.0)
        if PER_TOKEN:
            if dgate_ptr is not None:
                store_rows(dgate_ptr, dn * (xhat * weight + bias), at, n_tokens, D)
            dn *= load_rows(gate_rows, at, ACC)
        if partials_ptr is not None:
            sum_dn += dn
            sum_dn_xhat += dn * xhat
        if df_ptr is not None:
            df = normalize_backward(dn * gated_weight, xhat, rstd, is_col, D, IS_RMS)
            store_rows(df_ptr, df, at, n_tokens, D)
    if partials_ptr is not None:
        partials_ptr += pid.to(tl.int64) * 2 * D + cols
        tl.store(partials_ptr, tl.sum(sum_dn, 0, keep_dims=True), mask=is_col)
        tl.store(partials_ptr + D, tl.sum(sum_dn_xhat, 0, keep_dims=True), mask=is_col)


def _launch_fwd(args: Forward) -> tuple[Tensor, Tensor]:
    """What `empty_fwd` allocates, filled."""
    out, stats = empty_fwd(args)
    x, f = args.x, args.f
    n_batch, n_tokens, n_cols = x.shape
    config = lookup("post_norm_fwd", n_cols, architecture(x))
    n_programs = n_batch * count_programs(n_tokens, config)
    if n_programs:
        _post_norm_fwd_kernel[(n_programs,)](
            *map(rows_of, (x, f, args.gate)), args.weight, args.bias, out, stats,
            n_batch, n_tokens, args.eps,
            IS_RMS=args.norm == "rms", PER_TOKEN=is_per_token(args.gate),
            **constants(n_cols, torch.promote_types(x.dtype, f.dtype), config),
        )  # fmt: skip
    return out, stats


def _launch_bwd(args: Backward) -> tuple[Tensor, Tensor, Tensor]:
    """What `empty_bwd` allocates, filled."""
    results = empty_bwd(args)
    df, dgate, sums = map(none_if_absent, results)
    do, f = contiguous_rows(args.do), args.f
    n_batch, n_tokens, n_cols = f.shape
    config = lookup("post_norm_bwd", n_cols, architecture(f))
    n_parts = count_programs(n_tokens, config)
    partials = None if sums is None else sums.new_empty(n_batch, n_parts, 2, n_cols)
    if n_batch * n_parts:
        _post_norm_bwd_kernel[(n_batch * n_parts,)](
            *map(rows_of, (do, f, args.gate)), args.stats, args.weight, args.bias,
            df, dgate, partials, n_batch, n_tokens,
            IS_RMS=args.norm == "rms", PER_TOKEN=is_per_token(args.gate),
            **constants(n_cols, torch.promote_types(args.do.dtype, f.dtype), config),
        )  # fmt: skip
    if partials is not None:
        torch.sum(partials, dim=1, out=sums)
    return results


forward_op = define_op(
    "post_norm_residual_fwd",
    flat(_launch_fwd),
    flat(portable.post_norm_residual_fwd),
    flat(empty_fwd),
)
backward_op = define_op(
    "post_norm_residual_bwd",
    flat(_launch_bwd),
    flat(portable.post_norm_residual_bwd),
    flat(empty_bwd),
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
    is_shared = gate is not None and not is_per_token(gate)
    need_sums = need_weight or need_bias or (need_gate and is_shared)
    df, dgate, sums = backward_op(
        do, f, stats, gate, weight, bias, ctx.norm,
        need_f, need_gate and not is_shared, need_sums,
    )  # fmt: skip
    dweight, dbias = None, None
    if need_sums:
        if is_shared:
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
        x, f: bf16, fp16, fp32 or fp64, of one shape, any strides.
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
    check_rows(x, MAX_ROW, batch_is_optional=True)
    check_like("f", f, x)
    check_affine(weight, bias, x)
    check_norm(norm)
    check_eps(eps)
    x, f = contiguous_rows(x), contiguous_rows(f)
    weight, bias = contiguous_rows(weight), contiguous_rows(bias)
    rows, f_rows = (x[None], f[None]) if x.ndim == 2 else (x, f)
    if gate is not None:
        check_tensor("gate", gate, ("x", x))
        if x.ndim == 2:
            if gate.shape not in (x.shape[1:], x.shape):
                expected = f"{list(x.shape[1:])} or {list(x.shape)}"
                raise ValueError(f"gate: expected shape {expected}, got {list(gate.shape)}")
            gate = gate if gate.ndim == 1 else gate[None]
        gate = as_vectors("gate", gate, rows, rows.shape[1])
        gate = expand_vectors(gate, rows.shape[0], gate.shape[1])
    refuse_tangents(x, f, gate, weight, bias)
    out, _ = forward_op(rows, f_rows, gate, weight, bias, norm, float(eps))
    return out[0] if x.ndim == 2 else out
