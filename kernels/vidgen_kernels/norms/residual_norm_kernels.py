"""Gated residual, feature cache, norm and modulation of token rows in one pass: forward, backward.

    y     = x + gate * f
    total = sum of the n - 1 older entries + y                only where n > 1, else h = y
    h     = (g / n) * total + (1 - g) * y                     g: the cache gate, a scalar
    xhat  = (h - mean(h)) * rstd, or h * rstd                 LayerNorm, RMSNorm
    a     = (xhat * weight + bias) * (1 + scale) + shift

y and h are rounded to the dtype of x, total to its own, before what follows reads them.

    dxhat   = da * weight * (1 + scale)
    dh'     = dh + rstd * (dxhat - mean(dxhat) - xhat * mean(dxhat * xhat))
    dtotal' = dtotal + (g / n) * dh'                          the gradient of every older entry
    dy'     = dy + (1 - g) * dh' + dtotal'                    = dx
    df      = gate * dy',   dgate = sum of dy' * f
    dg      = sum of dh' * (total / n - y)
    dshift  = sum of da,    dscale = weight * sum of da * xhat + bias * sum of da

Shapes: x, f, h, a, y, total and entries [B, T, D]; weight, bias [D]; gate, scale, shift are
[B or 1, 1, D], or [B, tokens, D] with a vector for every token. The first `text_length` tokens of
a batch row are text and have vectors of their own, the second of each list.

A program owns consecutive rows of one batch row and one modality, so it loads the vectors once,
and adds up what belongs to the columns in registers. These partial sums are written once and then
summed, without atomics: gradients are bitwise repeatable. Saved are y, f where the gate learns, and
the mean and rstd of each row; with a cache, backward sums the older entries again.

Feature cache and gate: RepVideo (arXiv 2501.08994); adaptive LayerNorm of text and video apart:
CogVideoX (2408.06072). n = 1 is the residual, norm and modulation of all other transformers.
"""

from collections.abc import Iterable
from functools import reduce

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.jit import normalize_backward, statistics
from ..common.launch import accumulator_dtype, architecture
from .configs import lookup
from .residual_norm_portable import has_vector_per_token
from .rows import load_columns, load_rows, store_rows

TRITON_DTYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}

SIZES = ("n_batch", "n_tokens", "text_length", "n_entries")  # compiled once for all of them


@triton.jit
def _rows_of_program(pid, n_tokens, text_length, ROWS: tl.constexpr, TILES: tl.constexpr):
    """Batch row, whether its rows are text, first of them and end."""
    n_text = tl.cdiv(text_length, ROWS * TILES)
    n_chunks = n_text + tl.cdiv(n_tokens - text_length, ROWS * TILES)
    batch = (pid // n_chunks).to(tl.int64)
    chunk = pid % n_chunks
    is_text = chunk < n_text
    first = tl.where(is_text, 0, text_length - n_text * ROWS * TILES) + chunk * ROWS * TILES
    end = tl.minimum(first + ROWS * TILES, tl.where(is_text, text_length, n_tokens))
    return batch, is_text, first, end


@triton.jit
def _load_vector(ptrs, strides, batch, token, is_text, cols, mask, ACC: tl.constexpr):
    """The vector of the program's modality: [1, BLOCK_D], or that of each ``token``."""
    if len(ptrs) == 1:
        vector = load_rows(ptrs[0], strides[0], batch, token, cols, mask, ACC)
    elif is_text:
        vector = load_rows(ptrs[1], strides[1], batch, token, cols, mask, ACC)
    else:
        vector = load_rows(ptrs[0], strides[0], batch, token, cols, mask, ACC)
    return vector


@triton.jit
def _load_total(
    entry_ptrs, stride_entries, y, batch, row, cols, mask, ACC: tl.constexpr, SUM: tl.constexpr
):
    """The entries and y added one by one, as the running sum was."""
    total = load_rows(entry_ptrs[0], stride_entries[0], batch, row, cols, mask, ACC)
    for i in tl.static_range(1, len(entry_ptrs)):
        entry = load_rows(entry_ptrs[i], stride_entries[i], batch, row, cols, mask, ACC)
        total = (total + entry).to(SUM).to(ACC)
    return (total + y).to(SUM).to(ACC)


@triton.jit(do_not_specialize=SIZES)
def _residual_norm_fwd_kernel(
    x_ptr, f_ptr, entry_ptrs, cache_gate_ptr, gate_ptrs, scale_ptrs, shift_ptrs,
    weight_ptr, bias_ptr, h_ptr, a_ptr, total_ptr, y_ptr,
    stats_ptr,  # [2, B, T]: mean, rstd
    # strides: (batch, token), in a tuple for each of the tuples of pointers
    stride_x, stride_f, stride_entries, stride_gate, stride_scale, stride_shift,
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
    no_token = tl.zeros([1, 1], tl.int32)
    dtype = x_ptr.dtype.element_ty

    if cache_gate_ptr is not None:
        g = tl.load(cache_gate_ptr).to(ACC)
        g_mean = g / n_entries
    weight = load_columns(weight_ptr, cols, is_col, 1.0, ACC)
    bias = load_columns(bias_ptr, cols, is_col, 0.0, ACC)
    if not PER_TOKEN:
        if len(gate_ptrs):
            gate = _load_vector(gate_ptrs, stride_gate, batch, no_token, is_text, cols, is_col, ACC)
        if len(scale_ptrs):
            scale = 1 + _load_vector(
                scale_ptrs, stride_scale, batch, no_token, is_text, cols, is_col, ACC
            )
            weight, bias = weight * scale, bias * scale
        if len(shift_ptrs):
            bias += _load_vector(
                shift_ptrs, stride_shift, batch, no_token, is_text, cols, is_col, ACC
            )

    for start in range(first, end, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        mask = (row < end) & is_col
        token = row - first_token
        y = load_rows(x_ptr, stride_x, batch, row, cols, mask, ACC)
        if f_ptr is not None:
            f = load_rows(f_ptr, stride_f, batch, row, cols, mask, ACC)
            if len(gate_ptrs):
                if PER_TOKEN:
                    gate = _load_vector(
                        gate_ptrs, stride_gate, batch, token, is_text, cols, mask, ACC
                    )
                f = gate * f
            y = (y + f).to(dtype).to(ACC)
        if y_ptr is not None:
            store_rows(y_ptr, y, batch, row, cols, mask, n_tokens, D)
        h = y
        if cache_gate_ptr is not None:
            total = _load_total(entry_ptrs, stride_entries, y, batch, row, cols, mask, ACC, SUM)
            if total_ptr is not None:
                store_rows(total_ptr, total, batch, row, cols, mask, n_tokens, D)
            h = (g_mean * total + (1 - g) * y).to(dtype).to(ACC)
        if h_ptr is not None:
            store_rows(h_ptr, h, batch, row, cols, mask, n_tokens, D)
        if a_ptr is not None:
            mean, rstd = statistics(h, is_col, D, eps, IS_RMS)
            stats_ptrs = stats_ptr + batch * n_tokens + row
            tl.store(stats_ptrs, mean, mask=row < end)
            tl.store(stats_ptrs + n_batch * n_tokens, rstd, mask=row < end)
            a = (h - mean) * rstd * weight + bias
            if PER_TOKEN:
                if len(scale_ptrs):
                    a *= 1 + _load_vector(
                        scale_ptrs, stride_scale, batch, token, is_text, cols, mask, ACC
                    )
                if len(shift_ptrs):
                    a += _load_vector(
                        shift_ptrs, stride_shift, batch, token, is_text, cols, mask, ACC
                    )
            store_rows(a_ptr, a, batch, row, cols, mask, n_tokens, D)


@triton.jit(do_not_specialize=SIZES)
def _residual_norm_bwd_kernel(
    dh_ptr, da_ptr, dtotal_ptr, dy_ptr, y_ptr, stats_ptr, f_ptr, entry_ptrs, cache_gate_ptr,
    gate_ptrs, scale_ptrs, weight_ptr, bias_ptr,
    dx_ptr, df_ptr, dentries_ptr, dgate_ptr, dscale_ptr,
    partials_ptr,  # [programs, 1 to 3, D]: sums of da and da * xhat; of dy * f
    dcache_gate_ptr,  # [programs]
    # strides: (batch, token), in a tuple for each of the tuples of pointers
    stride_dh, stride_da, stride_dtotal, stride_dy, stride_y, stride_f, stride_entries,
    stride_gate, stride_scale,
    n_batch, n_tokens, text_length, n_entries,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
    IS_RMS: tl.constexpr, PER_TOKEN: tl.constexpr, SUM_AFFINE: tl.constexpr, ACC: tl.constexpr,
    SUM: tl.constexpr,
):  # fmt: skip
    """Without a cache ``y_ptr`` is h, which is y then. ``PER_TOKEN`` writes dgate and dscale row
    by row, and the sums of da have the factor 1 + scale, as weight and bias ask for."""
    pid = tl.program_id(0)
    batch, is_text, first, end = _rows_of_program(  # pyright: ignore
        pid, n_tokens, text_length, ROWS, TILES
    )
    first_token = tl.where(is_text, 0, text_length)
    cols = tl.arange(0, BLOCK_D)[None, :]
    is_col = cols < D
    no_token = tl.zeros([1, 1], tl.int32)
    dtype = y_ptr.dtype.element_ty

    if cache_gate_ptr is not None:
        g = tl.load(cache_gate_ptr).to(ACC)
        g_mean = g / n_entries
    weight = load_columns(weight_ptr, cols, is_col, 1.0, ACC)
    if PER_TOKEN:
        bias = load_columns(bias_ptr, cols, is_col, 0.0, ACC)
    else:
        if len(gate_ptrs):
            gate = _load_vector(gate_ptrs, stride_gate, batch, no_token, is_text, cols, is_col, ACC)
        if len(scale_ptrs):
            weight *= 1 + _load_vector(
                scale_ptrs, stride_scale, batch, no_token, is_text, cols, is_col, ACC
            )
    sum_da = tl.zeros([1, BLOCK_D], ACC)
    sum_da_xhat = tl.zeros([1, BLOCK_D], ACC)
    sum_dgate = tl.zeros([1, BLOCK_D], ACC)
    dg = tl.zeros([ROWS, 1], ACC)

    for start in range(first, end, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        mask = (row < end) & is_col
        token = row - first_token
        y = load_rows(y_ptr, stride_y, batch, row, cols, mask, ACC)
        h = y
        if cache_gate_ptr is not None:
            total = _load_total(entry_ptrs, stride_entries, y, batch, row, cols, mask, ACC, SUM)
            h = (g_mean * total + (1 - g) * y).to(dtype).to(ACC)
        if dh_ptr is None:
            dh = tl.zeros([ROWS, BLOCK_D], ACC)
        else:
            dh = load_rows(dh_ptr, stride_dh, batch, row, cols, mask, ACC)
        if da_ptr is not None:
            stats_ptrs = stats_ptr + batch * n_tokens + row
            mean = tl.load(stats_ptrs, mask=row < end, other=0.0)
            rstd = tl.load(stats_ptrs + n_batch * n_tokens, mask=row < end, other=0.0)
            xhat = tl.where(is_col, (h - mean) * rstd, 0.0)
            da = load_rows(da_ptr, stride_da, batch, row, cols, mask, ACC)
            if PER_TOKEN:
                if dscale_ptr is not None:
                    dscale = da * (xhat * weight + bias)
                    store_rows(dscale_ptr, dscale, batch, row, cols, mask, n_tokens, D)
                if len(scale_ptrs):
                    da *= 1 + _load_vector(
                        scale_ptrs, stride_scale, batch, token, is_text, cols, mask, ACC
                    )
            dh += normalize_backward(da * weight, xhat, rstd, is_col, D, IS_RMS)
            if SUM_AFFINE:
                sum_da += tl.sum(da, axis=0, keep_dims=True)
                sum_da_xhat += tl.sum(da * xhat, axis=0, keep_dims=True)
        dy = dh
        if cache_gate_ptr is not None:
            dg += tl.sum(dh * (total / n_entries - y), axis=1, keep_dims=True)
            dtotal = g_mean * dh
            if dtotal_ptr is not None:
                dtotal += load_rows(dtotal_ptr, stride_dtotal, batch, row, cols, mask, ACC)
            if dentries_ptr is not None:
                store_rows(dentries_ptr, dtotal, batch, row, cols, mask, n_tokens, D)
            dy = (1 - g) * dh + dtotal
        if dy_ptr is not None:
            dy += load_rows(dy_ptr, stride_dy, batch, row, cols, mask, ACC)
        store_rows(dx_ptr, dy, batch, row, cols, mask, n_tokens, D)
        if df_ptr is not None:
            if PER_TOKEN:
                gate = _load_vector(gate_ptrs, stride_gate, batch, token, is_text, cols, mask, ACC)
            store_rows(df_ptr, gate * dy, batch, row, cols, mask, n_tokens, D)
        if f_ptr is not None:
            dgate = dy * load_rows(f_ptr, stride_f, batch, row, cols, mask, ACC)
            if PER_TOKEN:
                store_rows(dgate_ptr, dgate, batch, row, cols, mask, n_tokens, D)
            else:
                sum_dgate += tl.sum(dgate, axis=0, keep_dims=True)

    SUM_GATE: tl.constexpr = f_ptr is not None and not PER_TOKEN
    partials_ptr += pid.to(tl.int64) * (2 * SUM_AFFINE + SUM_GATE) * D + cols
    if SUM_AFFINE:
        tl.store(partials_ptr, sum_da, mask=is_col)
        tl.store(partials_ptr + D, sum_da_xhat, mask=is_col)
    if SUM_GATE:
        tl.store(partials_ptr + 2 * SUM_AFFINE * D, sum_dgate, mask=is_col)
    if cache_gate_ptr is not None:
        tl.store(dcache_gate_ptr + pid, tl.sum(dg))


def launch_fwd(
    x: Tensor, f: Tensor | None, entries: list[Tensor], older: list[Tensor],
    cache_gate: Tensor | None, gate: list[Tensor], scale: list[Tensor], shift: list[Tensor],
    weight: Tensor | None, bias: Tensor | None, text_length: int, n_entries: int, norm: str,
    eps: float, a_dtype: torch.dtype, sum_dtype: torch.dtype, keep_total: bool, keep_y: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """h, a, total, y, and mean and rstd [2, B, T].

    Empty vectors stand for what is not asked for, or is x itself.

    Args:
        entries: tensors whose sum, with y, is total: the running sum alone, or all older entries.
        older: for backward, which reads them rather than ``entries`` where there are any.
        norm: "layer", "rms", or "" where there is no a.
        keep_total, keep_y: whether the caller wants them.
    """
    results = empty_fwd(
        x, f, entries, older, cache_gate, gate, scale, shift, weight, bias, text_length, n_entries,
        norm, eps, a_dtype, sum_dtype, keep_total, keep_y,
    )  # fmt: skip
    config = lookup("residual_norm_fwd", x.shape[2], architecture(x))
    grid = (len(x) * sum(_chunks(x, text_length, config.rows * config.tiles)),)
    if grid[0]:
        _residual_norm_fwd_kernel[grid](
            x, f, tuple(entries), cache_gate, tuple(gate), tuple(scale), tuple(shift),
            weight, bias, *map(given, results),
            *_strides(x, f), *map(_strides_of_all, (entries, gate, scale, shift)),
            len(x), x.shape[1], text_length, n_entries, eps,
            **_constants(x, norm, sum_dtype, [*gate, *scale, *shift]), **config.kwargs(),
        )  # fmt: skip
    return results


def launch_bwd(
    dh: Tensor | None, da: Tensor | None, dtotal: Tensor | None, dy: Tensor | None,
    y: Tensor, stats: Tensor | None, f: Tensor | None, entries: list[Tensor],
    cache_gate: Tensor | None, gate: list[Tensor], scale: list[Tensor], weight: Tensor | None,
    bias: Tensor | None, text_length: int, n_entries: int, norm: str, f_dtype: torch.dtype,
    entries_dtype: torch.dtype, sum_dtype: torch.dtype, need_f: bool, need_entries: bool,
    need_scale: bool, need_affine: bool, per_sample: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, df, the gradient of each entry, of the cache gate, per token of gate and scale, and sums.

    The sums over the tokens of a modality, [1 or 2 modalities, B, 1 to 3, D], the batch as 1 row
    where nothing is ``per_sample``: those of da and
    da * xhat where ``need_affine``, that of dy * f where there is f and no gate per token.
    Empty tensors stand for what is not asked for.

    Args:
        y: without a cache, h, which is y then.
        f: None where the gate needs no gradient.
    """
    results = empty_bwd(
        dh, da, dtotal, dy, y, stats, f, entries, cache_gate, gate, scale, weight, bias,
        text_length, n_entries, norm, f_dtype, entries_dtype, sum_dtype, need_f, need_entries,
        need_scale, need_affine, per_sample,
    )  # fmt: skip
    dcache_gate, sums = results[3], results[6]
    # e.g. the expanded gradient of a sum
    dh, da, dtotal, dy = (
        g if g is None or g.stride(-1) == 1 else g.contiguous() for g in (dh, da, dtotal, dy)
    )
    config = lookup("residual_norm_bwd", y.shape[2], architecture(y))
    n_text, n_video = _chunks(y, text_length, config.rows * config.tiles)
    grid = (len(y) * (n_text + n_video),)
    partials = sums.new_empty(len(y), n_text + n_video, *sums.shape[2:])
    partials_of_gate = y.new_empty(grid, dtype=dcache_gate.dtype)
    if grid[0]:
        _residual_norm_bwd_kernel[grid](
            dh, da, dtotal, dy, y, stats, f, tuple(entries), cache_gate, tuple(gate), tuple(scale),
            weight, bias, *map(given, (*results[:3], *results[4:6])), partials, partials_of_gate,
            *_strides(dh, da, dtotal, dy, y, f), *map(_strides_of_all, (entries, gate, scale)),
            len(y), y.shape[1], text_length, n_entries, SUM_AFFINE=need_affine,
            **_constants(y, norm, sum_dtype, [*gate, *scale]), **config.kwargs(),
        )  # fmt: skip
    if given(dcache_gate) is not None:
        torch.sum(partials_of_gate, dim=0, out=dcache_gate)
    if given(sums) is not None:
        for modality, of_chunks in enumerate((partials[:, n_text:], partials[:, :n_text])):
            if modality < len(sums):
                of_chunks = of_chunks if per_sample else of_chunks.flatten(0, 1)[None]
                torch.sum(of_chunks, dim=1, out=sums[modality])
    return results


def empty_fwd(
    x, f, entries, older, cache_gate, gate, scale, shift, weight, bias, text_length, n_entries,
    norm, eps, a_dtype, sum_dtype, keep_total, keep_y,
):  # fmt: skip
    """What `launch_fwd` returns, not filled yet."""
    is_cached = cache_gate is not None
    h = x.new_empty(x.shape if is_cached or f is not None else 0)
    a = x.new_empty(x.shape if norm else 0, dtype=a_dtype)
    total = x.new_empty(x.shape if keep_total else 0, dtype=sum_dtype)
    acc = torch.promote_types(x.dtype, torch.float32)
    stats = x.new_empty((2, *x.shape[:2]) if norm else 0, dtype=acc)
    return h, a, total, x.new_empty(x.shape if keep_y else 0), stats


def empty_bwd(
    dh, da, dtotal, dy, y, stats, f, entries, cache_gate, gate, scale, weight, bias,
    text_length, n_entries, norm, f_dtype, entries_dtype, sum_dtype, need_f, need_entries,
    need_scale, need_affine, per_sample,
):  # fmt: skip
    """What `launch_bwd` returns, not filled yet."""
    is_per_token = has_vector_per_token([*gate, *scale])
    n_sums = 2 * need_affine + (f is not None and not is_per_token)
    acc = torch.promote_types(y.dtype, torch.float32)
    n_samples = len(y) if per_sample else 1
    shape_of_sums = 1 + (text_length > 0), n_samples, n_sums, y.shape[2]
    return (
        y.new_empty(y.shape),
        y.new_empty(y.shape if need_f else 0, dtype=f_dtype),
        y.new_empty(y.shape if need_entries else 0, dtype=entries_dtype),
        y.new_empty(0 if cache_gate is None else (), dtype=acc),
        y.new_empty(
            y.shape if f is not None and is_per_token else 0,
            dtype=widest(v.dtype for v in gate or [y]),
        ),
        y.new_empty(
            y.shape if need_scale and is_per_token else 0,
            dtype=widest(v.dtype for v in scale or [y]),
        ),
        y.new_empty(shape_of_sums if n_sums else 0, dtype=acc),
    )


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """One that holds what any of them does, for a gradient that several tensors share."""
    return reduce(torch.promote_types, dtypes)


def given(x: Tensor) -> Tensor | None:
    """None for the empty vector that stands for a result that is not there."""
    return None if x.ndim == 1 else x


def _chunks(x: Tensor, text_length: int, n_rows: int) -> tuple[int, int]:
    """Programs of ``n_rows`` rows that a batch row takes, for text and for the other tokens."""
    return -(-text_length // n_rows), -(-(x.shape[1] - text_length) // n_rows)


def _strides(*tensors: Tensor | None) -> list[tuple[int, int]]:
    """Over batch rows and tokens, where something can be added: 0 for a size of 1."""
    return [
        (0, 0)
        if x is None
        else (x.stride(0) if len(x) > 1 else 0, x.stride(1) if x.shape[1] > 1 else 0)
        for x in tensors
    ]


def _strides_of_all(tensors: list[Tensor]) -> tuple[tuple[int, int], ...]:
    return tuple(_strides(*tensors))


def _constants(x: Tensor, norm: str, sum_dtype: torch.dtype, vectors: list[Tensor]) -> dict:
    return {
        "D": x.shape[2],
        "BLOCK_D": triton.next_power_of_2(x.shape[2]),
        "IS_RMS": norm == "rms",
        "PER_TOKEN": has_vector_per_token(vectors),
        "ACC": accumulator_dtype(x.dtype),
        "SUM": TRITON_DTYPES[sum_dtype],
    }
