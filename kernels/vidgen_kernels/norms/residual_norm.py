"""Gated residual, feature cache, norm and modulation of token rows in one pass: forward, backward.

    y     = x + gate * f
    total = sum of the n - 1 older entries + y                only if n > 1, else h = y
    h     = (g / n) * total + (1 - g) * y                     g: the cache gate, a scalar
    xhat  = (h - mean(h)) * rstd, or h * rstd                 LayerNorm, RMSNorm
    a     = (xhat * weight + bias) * (1 + scale) + shift

y and h are rounded to the dtype of x, and total to its own, before the next line reads them.

    dxhat   = da * weight * (1 + scale)
    dh'     = dh + rstd * (dxhat - mean(dxhat) - xhat * mean(dxhat * xhat))
    dtotal' = dtotal + (g / n) * dh'                          the gradient of each older entry
    dy'     = dy + (1 - g) * dh' + dtotal'                    = dx
    df      = gate * dy',   dgate = sum of dy' * f
    dg      = sum of dh' * (total / n - y)
    dshift  = sum of da,    dscale = weight * sum of da * xhat + bias * sum of da

Shapes: x, f, h, a, y, total and entries [B, T, D]; weight, bias [D]; gate, scale, shift
[B or 1, 1, D], or [B, tokens, D] with a vector for each token. The first `text_length` tokens of
a batch row are text and have vectors of their own, the second of each list.

A program owns consecutive rows of one batch row and one modality, so it loads shared vectors once
and keeps sums over its rows in registers. It writes these partial sums once, and PyTorch adds them:
there are no atomics, and gradients are bitwise repeatable. Saved for backward are y, the mean and
rstd of each row, and f if the gate needs a gradient; with a cache, backward sums the entries again.

`residual_norm` uses it without a cache (n = 1), as all transformers have it; `feature_cache` with
one. Feature cache and gate: RepVideo (arXiv 2501.08994). Vectors of the text: CogVideoX
(2408.06072).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.configs import RowConfig
from ..common.front_door import autocast_dtype, contiguous_rows, refuse_tangents
from ..common.jit import normalize_backward, statistics
from ..common.launch import architecture
from ..common.registration import define_op, refuse_double_backward
from . import residual_norm_portable as portable
from .arguments import (
    Modulation,
    check_affine,
    check_eps,
    check_like,
    check_norm,
    check_rows,
    check_text,
    has_vector_per_token,
    modulation_vectors,
)
from .configs import ROW_WISE, lookup
from .operands import flat, none_if_absent
from .residual_norm_operands import Backward, Forward, empty_bwd, empty_fwd, widest_dtype
from .rows import (
    constants,
    count_programs,
    load_columns,
    load_rows,
    load_stats,
    rows_of,
    store_rows,
    store_stats,
)

MAX_ROW = max(ROW_WISE["residual_norm_bwd"])
TRITON_DTYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}

SIZES = ("n_batch", "n_tokens", "text_length", "n_entries")  # compiled once for all values


@triton.jit
def _rows_of_program(pid, n_tokens, text_length, ROWS: tl.constexpr, TILES: tl.constexpr):
    """Batch row, whether its rows are text, first of them, and end."""
    n_text = tl.cdiv(text_length, ROWS * TILES)
    n_chunks = n_text + tl.cdiv(n_tokens - text_length, ROWS * TILES)
    batch = (pid // n_chunks).to(tl.int64)
    chunk = pid % n_chunks
    is_text = chunk < n_text
    first = tl.where(is_text, 0, text_length - n_text * ROWS * TILES) + chunk * ROWS * TILES
    end = tl.minimum(first + ROWS * TILES, tl.where(is_text, text_length, n_tokens))
    return batch, is_text, first, end


@triton.jit
def _load_vector(vectors, default, is_text, at, ACC: tl.constexpr):
    """The gate, scale or shift of the program's modality, ``default`` if there is none.

    [1, BLOCK_D], or [ROWS, BLOCK_D] with a vector for each token.
    """
    if len(vectors) == 0:
        vector = tl.full([1, 1], default, ACC)
    elif len(vectors) == 1:
        vector = load_rows(vectors[0], at, ACC)
    elif is_text:
        vector = load_rows(vectors[1], at, ACC)
    else:
        vector = load_rows(vectors[0], at, ACC)
    return vector


@triton.jit
def _load_total(entries, y, at, ACC: tl.constexpr, SUM: tl.constexpr):
    """The entries and y added one by one, as a running sum adds them."""
    total = load_rows(entries[0], at, ACC)
    for i in tl.static_range(1, len(entries)):
        total = (total + load_rows(entries[i], at, ACC)).to(SUM).to(ACC)
    return (total + y).to(SUM).to(ACC)


@triton.jit(do_not_specialize=SIZES)
def _residual_norm_fwd_kernel(
    x_rows, f_rows, entries, cache_gate_ptr, gates, scales, shifts, weight_ptr, bias_ptr,
    h_ptr, a_ptr, total_ptr, y_ptr,
    stats_ptr,  # [2, B, T]: mean, rstd
    n_batch, n_tokens, text_length, n_entries,
    eps: tl.float64,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
    IS_RMS: tl.constexpr, PER_TOKEN: tl.constexpr, ACC: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    batch, is_text, first, end = _rows_of_program(  # pyright: ignore
        pid, n_tokens, text_length, ROWS, TILES
    )
    first_token = tl.where(is_text, 0, text_length)  # of the modality
    cols = tl.arange(0, BLOCK_D)[None, :]
    is_col = cols < D
    dtype = x_rows[0].dtype.element_ty

    weight = load_columns(weight_ptr, cols, is_col, 1.0, ACC)
    bias = load_columns(bias_ptr, cols, is_col, 0.0, ACC)
    if not PER_TOKEN:  # scale and shift, which all rows share, are folded into weight and bias
        shared = (batch, tl.zeros([1, 1], tl.int32), cols, is_col)
        gate = _load_vector(gates, 1.0, is_text, shared, ACC)
        factor = 1 + _load_vector(scales, 0.0, is_text, shared, ACC)
        weight, bias = weight * factor, bias * factor
        if len(shifts):
            bias += _load_vector(shifts, 0.0, is_text, shared, ACC)
    if cache_gate_ptr is not None:
        g = tl.load(cache_gate_ptr).to(ACC)

    for start in range(first, end, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        mask = (row < end) & is_col
        at = (batch, row, cols, mask)
        at_token = (batch, row - first_token, cols, mask)
        y = load_rows(x_rows, at, ACC)
        if f_rows is not None:
            f = load_rows(f_rows, at, ACC)
            if PER_TOKEN:
                gate = _load_vector(gates, 1.0, is_text, at_token, ACC)
            y = (y + gate * f).to(dtype).to(ACC)
        if y_ptr is not None:
            store_rows(y_ptr, y, at, n_tokens, D)
        h = y
        if cache_gate_ptr is not None:
            total = _load_total(entries, y, at, ACC, SUM)
            if total_ptr is not None:
                store_rows(total_ptr, total, at, n_tokens, D)
            h = (g / n_entries * total + (1 - g) * y).to(dtype).to(ACC)
        if h_ptr is not None:
            store_rows(h_ptr, h, at, n_tokens, D)
        if a_ptr is not None:
            mean, rstd = statistics(h, is_col, D, eps, IS_RMS)  # pyright: ignore
            store_stats(stats_ptr, mean, rstd, batch, row, end, n_batch, n_tokens)
            a = (h - mean) * rstd * weight + bias
            if PER_TOKEN:
                a *= 1 + _load_vector(scales, 0.0, is_text, at_token, ACC)
                if len(shifts):
                    a += _load_vector(shifts, 0.0, is_text, at_token, ACC)
            store_rows(a_ptr, a, at, n_tokens, D)


@triton.jit(do_not_specialize=SIZES)
def _residual_norm_bwd_kernel(
    dh_rows, da_rows, dtotal_rows, dy_rows, y_rows, stats_ptr, f_rows, entries, cache_gate_ptr,
    gates, scales, weight_ptr, bias_ptr,
    dx_ptr, df_ptr, dentries_ptr, dgate_ptr, dscale_ptr,
    partials_ptr,  # [programs, 1 to 3, D]: sums of da and da * xhat; of dy * f
    dcache_gate_ptr,  # [programs]
    n_batch, n_tokens, text_length, n_entries,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
    IS_RMS: tl.constexpr, PER_TOKEN: tl.constexpr, SUM_AFFINE: tl.constexpr, ACC: tl.constexpr,
    SUM: tl.constexpr,
):  # fmt: skip
    """Without a cache ``y_rows`` is h, which equals y.

    With PER_TOKEN, dgate and dscale are written row by row, and the sums of da, from which dweight
    and dbias follow, include the factor 1 + scale. Without it they do not, and dscale and dshift
    follow from them as well.
    """
    pid = tl.program_id(0)
    batch, is_text, first, end = _rows_of_program(  # pyright: ignore
        pid, n_tokens, text_length, ROWS, TILES
    )
    first_token = tl.where(is_text, 0, text_length)
    cols = tl.arange(0, BLOCK_D)[None, :]
    is_col = cols < D
    dtype = y_rows[0].dtype.element_ty

    weight = load_columns(weight_ptr, cols, is_col, 1.0, ACC)
    if PER_TOKEN:
        bias = load_columns(bias_ptr, cols, is_col, 0.0, ACC)
    else:
        shared = (batch, tl.zeros([1, 1], tl.int32), cols, is_col)
        gate = _load_vector(gates, 1.0, is_text, shared, ACC)
        weight *= 1 + _load_vector(scales, 0.0, is_text, shared, ACC)
    if cache_gate_ptr is not None:
        g = tl.load(cache_gate_ptr).to(ACC)
    sum_da = tl.zeros([1, BLOCK_D], ACC)
    sum_da_xhat = tl.zeros([1, BLOCK_D], ACC)
    sum_dgate = tl.zeros([1, BLOCK_D], ACC)
    dg = tl.zeros([ROWS, 1], ACC)

    for start in range(first, end, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        mask = (row < end) & is_col
        at = (batch, row, cols, mask)
        at_token = (batch, row - first_token, cols, mask)
        y = load_rows(y_rows, at, ACC)
        h = y
        if cache_gate_ptr is not None:
            total = _load_total(entries, y, at, ACC, SUM)
            h = (g / n_entries * total + (1 - g) * y).to(dtype).to(ACC)
        dh = load_rows(dh_rows, at, ACC)
        if da_rows is not None:
            mean, rstd = load_stats(stats_ptr, batch, row, end, n_batch, n_tokens)  # pyright: ignore
            xhat = tl.where(is_col, (h - mean) * rstd, 0.0)
            da = load_rows(da_rows, at, ACC)
            if dscale_ptr is not None:
                store_rows(dscale_ptr, da * (xhat * weight + bias), at, n_tokens, D)
            if PER_TOKEN:
                da *= 1 + _load_vector(scales, 0.0, is_text, at_token, ACC)
            dh += normalize_backward(da * weight, xhat, rstd, is_col, D, IS_RMS)
            if SUM_AFFINE:
                sum_da += tl.sum(da, axis=0, keep_dims=True)
                sum_da_xhat += tl.sum(da * xhat, axis=0, keep_dims=True)
        dy = dh
        if cache_gate_ptr is not None:
            dg += tl.sum(dh * (total / n_entries - y), axis=1, keep_dims=True)
            dtotal = g / n_entries * dh
            if dtotal_rows is not None:
                dtotal += load_rows(dtotal_rows, at, ACC)
            if dentries_ptr is not None:
                store_rows(dentries_ptr, dtotal, at, n_tokens, D)
            dy = (1 - g) * dh + dtotal
        if dy_rows is not None:
            dy += load_rows(dy_rows, at, ACC)
        store_rows(dx_ptr, dy, at, n_tokens, D)
        if df_ptr is not None:
            if PER_TOKEN:
                gate = _load_vector(gates, 1.0, is_text, at_token, ACC)
            store_rows(df_ptr, gate * dy, at, n_tokens, D)
        if f_rows is not None:
            dgate = dy * load_rows(f_rows, at, ACC)
            if PER_TOKEN:
                store_rows(dgate_ptr, dgate, at, n_tokens, D)
            else:
                sum_dgate += tl.sum(dgate, axis=0, keep_dims=True)

    SUM_GATE: tl.constexpr = f_rows is not None and not PER_TOKEN
    if SUM_AFFINE or SUM_GATE:
        partials_ptr += pid.to(tl.int64) * (2 * SUM_AFFINE + SUM_GATE) * D + cols
    if SUM_AFFINE:
        tl.store(partials_ptr, sum_da, mask=is_col)
        tl.store(partials_ptr + D, sum_da_xhat, mask=is_col)
    if SUM_GATE:
        tl.store(partials_ptr + 2 * SUM_AFFINE * D, sum_dgate, mask=is_col)
    if cache_gate_ptr is not None:
        tl.store(dcache_gate_ptr + pid, tl.sum(dg))


def _launch_fwd(args: Forward) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `empty_fwd` allocates, filled."""
    results = empty_fwd(args)
    n_batch, n_tokens, n_cols = args.x.shape
    config = lookup("residual_norm_fwd", n_cols, architecture(args.x))
    n_programs = n_batch * sum(_programs_of_modalities(args.text_length, n_tokens, config))
    if n_programs:
        _residual_norm_fwd_kernel[(n_programs,)](
            rows_of(args.x), rows_of(args.f), _all_rows(args.entries), args.cache_gate,
            *map(_all_rows, (args.gate, args.scale, args.shift)), args.weight, args.bias,
            *map(none_if_absent, results),
            n_batch, n_tokens, args.text_length, args.n_entries, args.eps,
            IS_RMS=args.norm == "rms",
            PER_TOKEN=has_vector_per_token([*args.gate, *args.scale, *args.shift]),
            SUM=TRITON_DTYPES[args.sum_dtype], **constants(n_cols, args.x.dtype, config),
        )  # fmt: skip
    return results


def _launch_bwd(
    args: Backward,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `empty_bwd` allocates, filled."""
    results = empty_bwd(args)
    dx, df, dentries, dcache_gate, dgate, dscale, sums = map(none_if_absent, results)
    y = args.y
    n_batch, n_tokens, n_cols = y.shape
    config = lookup("residual_norm_bwd", n_cols, architecture(y))
    n_text, n_video = _programs_of_modalities(args.text_length, n_tokens, config)
    n_programs = n_batch * (n_text + n_video)
    partials, partials_of_gate = None, None
    if sums is not None:
        partials = sums.new_empty(n_batch, n_text + n_video, *sums.shape[2:])
    if dcache_gate is not None:
        partials_of_gate = dcache_gate.new_empty(n_programs)
    if n_programs:
        upstream = map(contiguous_rows, (args.dh, args.da, args.dtotal, args.dy))
        _residual_norm_bwd_kernel[(n_programs,)](
            *map(rows_of, upstream), rows_of(y), args.stats, rows_of(args.f),
            _all_rows(args.entries), args.cache_gate, _all_rows(args.gate), _all_rows(args.scale),
            args.weight, args.bias,
            dx, df, dentries, dgate, dscale, partials, partials_of_gate,
            n_batch, n_tokens, args.text_length, args.n_entries,
            IS_RMS=args.norm == "rms", PER_TOKEN=has_vector_per_token([*args.gate, *args.scale]),
            SUM_AFFINE=args.need_affine, SUM=TRITON_DTYPES[args.sum_dtype],
            **constants(n_cols, y.dtype, config),
        )  # fmt: skip
    if partials_of_gate is not None:
        torch.sum(partials_of_gate, dim=0, out=dcache_gate)
    if partials is not None and sums is not None:
        of_modalities = partials[:, n_text:], partials[:, :n_text]
        for of_programs, out in zip(of_modalities, sums, strict=False):
            if not args.per_sample:
                of_programs = of_programs.flatten(0, 1)[None]
            torch.sum(of_programs, dim=1, out=out)
    return results


def _programs_of_modalities(n_text: int, n_tokens: int, config: RowConfig) -> tuple[int, int]:
    """How many programs a batch row takes, for its text and for its other tokens."""
    return count_programs(n_text, config), count_programs(n_tokens - n_text, config)


def _all_rows(tensors: list[Tensor]) -> tuple:
    return tuple([rows_of(x) for x in tensors])


forward_op = define_op(
    "residual_norm_fwd", flat(_launch_fwd), flat(portable.residual_norm_fwd), flat(empty_fwd)
)
backward_op = define_op(
    "residual_norm_bwd", flat(_launch_bwd), flat(portable.residual_norm_bwd), flat(empty_bwd)
)


def _setup_context(ctx, inputs, output) -> None:
    args = Forward._make(inputs)
    h, _, _, y, stats = output
    y = args.x if args.f is None else h if args.cache_gate is None else y
    if none_if_absent(y) is None:
        raise RuntimeError(
            "residual_norm_fwd: traced without gradients, it keeps nothing for a backward;"
            " trace it with inputs that require them"
        )
    ctx.text_length, ctx.n_entries, ctx.norm = args.text_length, args.n_entries, args.norm
    ctx.f_dtype = args.x.dtype if args.f is None else args.f.dtype
    ctx.sum_dtype = args.sum_dtype
    ctx.entry_dtypes, ctx.n_older = [entry.dtype for entry in args.entries], len(args.older)
    f = args.f if any(v.requires_grad for v in args.gate) else None  # only dgate reads it
    groups = args.gate, args.scale, args.shift, args.older or args.entries
    ctx.n_saved = [len(group) for group in groups]
    vectors = (v for group in groups for v in group)
    ctx.save_for_backward(
        y, none_if_absent(stats), f, args.cache_gate, args.weight, args.bias, *vectors
    )
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)


def _backward(ctx, dh, da, dtotal, dy, _):
    dh, da, dtotal, dy = (g if g is None else none_if_absent(g) for g in (dh, da, dtotal, dy))
    y, stats, f, cache_gate, weight, bias, *rest = ctx.saved_tensors
    gate, scale, shift, entries = ([rest.pop(0) for _ in range(n)] for n in ctx.n_saved)
    need: Any = Forward._make(ctx.needs_input_grad)  # of bools
    need_scale, need_weights = any(need.scale), need.weight or need.bias
    is_per_token = has_vector_per_token([*gate, *scale, *shift])
    need_vectors = not is_per_token and (need_scale or any(need.shift))
    need_affine = da is not None and (need_weights or need_vectors)
    dx, df, dentries, dcache_gate, dgate, dscale, sums = map(
        none_if_absent,
        backward_op(
            dh, da, dtotal, dy, y, stats, f, entries, cache_gate, gate, scale, weight, bias,
            ctx.text_length, ctx.n_entries, ctx.norm, ctx.f_dtype,
            widest_dtype(ctx.entry_dtypes or [y.dtype]), ctx.sum_dtype,
            need.f and bool(gate), any(need.entries), need_scale and da is not None,
            need_affine, not is_per_token and any(ctx.n_saved[:3]),
        ),
    )  # fmt: skip
    dweight, dbias = None, None
    if need_affine and need_weights:
        assert sums is not None
        dweight, dbias = _gradients_of_weights(sums, [] if is_per_token else scale)
    if is_per_token:
        parts = slice(ctx.text_length, None), slice(0, ctx.text_length)
        dgates, dscales, dshifts = (
            [None if g is None else g[:, part] for part in parts] for g in (dgate, dscale, da)
        )
    else:
        if sums is not None and len(sums) < max(ctx.n_saved[:3]):  # a text without tokens
            sums = torch.cat([sums, torch.zeros_like(sums)])
        dgates, dscales, dshifts = _gradients_of_vectors(sums, need_affine, weight, bias)
    return (
        dx,
        _like(ctx.f_dtype, dx if df is None else df) if need.f else None,
        [_like(dtype, dentries) for dtype in ctx.entry_dtypes],
        [None] * ctx.n_older,
        None if dcache_gate is None else dcache_gate.to(cache_gate.dtype).view(cache_gate.shape),
        [_like(v.dtype, g, len(v)) for v, g in zip(gate, dgates, strict=False)],
        [_like(v.dtype, g, len(v)) for v, g in zip(scale, dscales, strict=False)],
        [_like(v.dtype, g, len(v)) for v, g in zip(shift, dshifts, strict=False)],
        _like(weight.dtype, dweight) if weight is not None else None,
        _like(bias.dtype, dbias) if bias is not None else None,
        *[None] * 8,
    )


def _gradients_of_weights(sums: Tensor, scale: list[Tensor]) -> tuple[Tensor, Tensor]:
    """dweight and dbias, from sums that lack the factor 1 + scale if ``scale`` is given."""
    sums = sums[:, :, :2]
    parts = [s * (1 + v.to(s.dtype)) for v, s in zip(scale, sums, strict=False)] or [*sums]
    dbias, dweight = sum(parts[1:], start=parts[0]).sum(dim=0)
    return dweight, dbias


def _gradients_of_vectors(
    sums: Tensor | None, has_affine: bool, weight: Tensor | None, bias: Tensor | None
) -> tuple[list, list, list]:
    """dgate, dscale and dshift [B or 1, 1, D], each for the video tokens and for the text."""
    dgates: list[Tensor | None] = [None, None]
    dscales, dshifts = dgates.copy(), dgates.copy()
    for i, s in enumerate(() if sums is None else sums):  # [B or 1, 1 to 3, D]
        if has_affine:
            dshifts[i] = sum_da = s[:, 0:1]
            dscale = s[:, 1:2] if weight is None else s[:, 1:2] * weight
            dscales[i] = dscale if bias is None else dscale + sum_da * bias
        if s.shape[1] != 2:
            dgates[i] = s[:, -1:]
    return dgates, dscales, dshifts


def _like(dtype: torch.dtype, grad: Tensor | None, n_batch: int | None = None) -> Tensor | None:
    """``grad`` in ``dtype``, summed over the batch for a vector of one row, ``n_batch`` 1."""
    if grad is None:
        return None
    grad = grad.sum(dim=0, keepdim=True) if n_batch == 1 and len(grad) > 1 else grad
    return grad.to(dtype)


forward_op.register_autograd(_backward, setup_context=_setup_context)
refuse_double_backward(backward_op)


class Cached(NamedTuple):
    """The feature cache's part of the arguments of `run`."""

    gate: Tensor | None = None  # one element; None without a cache
    n_entries: int = 1  # at least 2 with a cache
    entries: Sequence[Tensor] = ()
    older: Sequence[Tensor] = ()
    sum_dtype: torch.dtype = torch.float32
    keep_total: bool = False


NOT_CACHED = Cached()


def run(
    x: Tensor,
    f: Tensor | None,
    own: Modulation,
    text: Modulation | None,
    text_length: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "",
    eps: float = 0.0,
    cached: Cached = NOT_CACHED,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Runs the operator, after checks of all arguments but ``norm`` and ``cached``.

    Returns:
        h.
        a: None without a norm, ``norm`` "".
        total: None unless it is to be kept.
        y: None if neither the caller nor backward needs it.
    """
    check_rows(x, MAX_ROW)
    if f is not None:
        check_like("f", f, x)
    if f is None and own.gate is not None:
        raise ValueError("gate: expected None without f, got a tensor")
    check_affine(weight, bias, x)
    if norm:
        check_eps(eps)
    check_text(text, text_length, x.shape[1])
    gate, scale, shift = modulation_vectors(own, text, text_length, x)
    rows, f, weight, bias = map(contiguous_rows, (x, f, weight, bias))
    tensors = rows, f, weight, bias, *gate, *scale, *shift, cached.gate, *cached.entries
    refuse_tangents(*tensors)
    keep_y = False
    if f is not None and cached.gate is not None and torch.is_grad_enabled():
        keep_y = any(t is not None and t.requires_grad for t in tensors)
    h, a, total, y, _ = map(
        none_if_absent,
        forward_op(
            rows, f, cached.entries, cached.older, cached.gate, gate, scale, shift, weight, bias,
            text_length, cached.n_entries, norm, eps, autocast_dtype(x), cached.sum_dtype,
            cached.keep_total, keep_y,
        ),
    )  # fmt: skip
    h = x if h is None else h
    return h, a, total, x if f is None else h if cached.gate is None else y


def residual_norm(
    x: Tensor,  # [B, T, D]
    f: Tensor | None = None,  # [B, T, D]
    *,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    text: Modulation | None = None,
    text_length: int = 0,
    weight: Tensor | None = None,  # [D]
    bias: Tensor | None = None,  # [D]
    norm: str = "layer",
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """``h = x + gate * f`` and ``a = norm(h) * weight + bias``, then ``* (1 + scale) + shift``.

    Args:
        x, f: bf16, fp16, fp32 or fp64, any strides. Without f, h is x.
        gate, scale, shift: [D], [B, D], [B, 1, D], or [B, T - text_length, D] for a vector per
            token; any floating dtype, read in place. None leaves one out.
        text: the same for the first ``text_length`` tokens of each batch row; None in the same
            places.
        weight, bias: any floating dtype.
        norm: "layer" or "rms"; statistics in fp32 (fp64 for fp64).
        eps: added to the mean square.

    Returns:
        h: in the dtype of x, rounded to it before the norm reads it. x itself without f.
        a: in the dtype of x, or the one that autocast asks for.

    Raises:
        ValueError: shapes, dtypes, devices or names that do not fit.
        NotImplementedError: double backward, forward-mode derivatives.
    """
    check_norm(norm)
    own = Modulation(gate, scale, shift)
    h, a, _, _ = run(x, f, own, text, text_length, weight, bias, norm, eps)
    assert a is not None
    return h, a
