"""`residual_norm` and `feature_cache` on a CPU, in one pass or in chunks that stay in the cache.

A plain LayerNorm, or a modulated one of few rows, and the gradient of either, take one pass over
all rows. All else goes through the formulas of `residual_norm.py` one chunk of rows at a time. The
tokens of a chunk are of one batch row and one modality. If they share their vectors, scale and
shift are folded into weight and bias of PyTorch's LayerNorm, whose backward then gives the sums
over the rows as well.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import has_vector_per_token
from .operands import absent, accumulator, none_if_absent
from .residual_norm_operands import Backward, Forward, empty_bwd, empty_fwd
from .rows_portable import (
    fill_stats,
    is_small,
    layer_norm_backward,
    normalize,
    normalize_again,
    rms_norm_backward,
    rows_per_chunk,
    small_layer_norm,
    stack_stats,
)


def residual_norm_fwd(args: Forward) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `empty_fwd` allocates, filled."""
    x, scale, shift = args.x, args.scale, args.shift
    if args.norm == "layer" and args.f is None and args.cache_gate is None:
        if not (scale or shift):
            a, stats = _whole_layer_norm(x, args.weight, args.bias, args.eps, args.a_dtype)
            return absent(x), a, absent(x), absent(x), stats
        if len(scale) < 2 and len(shift) < 2 and args.a_dtype == x.dtype:
            vectors = args.weight, args.bias, *(v[0] if v else None for v in (scale, shift))
            if is_small(x, *vectors):
                a, stats = small_layer_norm(x, *vectors, args.eps)
                return absent(x), a, absent(x), absent(x), stats
    results = empty_fwd(args)
    _forward_by_chunks(args, *map(none_if_absent, results))
    return results


def residual_norm_bwd(
    args: Backward,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `empty_bwd` allocates, filled."""
    y, da, scale = args.y, args.da, args.scale
    if (
        args.norm == "layer"
        and da is not None
        and args.stats is not None
        and args.cache_gate is None
        and not (args.gate or args.per_sample)
        and len(scale) < 2
        and da.dtype == y.dtype == args.stats.dtype
        and (not scale or is_small(y, *scale))
    ):
        return _whole_layer_norm_backward(args, da, args.stats)
    results = empty_bwd(args)
    _backward_by_chunks(args, *map(none_if_absent, results))  # pyright: ignore
    return results


def _whole_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """PyTorch's own, and its stats [2, B, T], which a weight in fp32 keeps in fp32."""
    acc = accumulator(x)
    weight, bias = (None if v is None else v.to(acc) for v in (weight, bias))
    if weight is None and x.dtype != acc:
        weight = x.new_ones(x.shape[-1], dtype=acc)
    a, mean, rstd = normalize(x if x.dtype == dtype else x.to(acc), weight, bias, False, eps)
    return a.to(dtype), stack_stats(mean, rstd)


def _whole_layer_norm_backward(
    args: Backward, da: Tensor, stats: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All of `residual_norm_bwd` for a norm alone; its scale, if any, is per token."""
    h, scale = args.y, args.scale[0] if args.scale else None
    mean, rstd = stats[..., None]
    weight, bias = (None if v is None else v.to(stats.dtype) for v in (args.weight, args.bias))
    sums, dscale = absent(h), absent(h)
    if args.need_affine:
        sums = stats.new_zeros(1 + (args.text_length > 0), 1, 2, h.shape[2])
    if scale is not None:
        if args.need_scale:
            dscale = normalize_again(h, mean, rstd, weight, bias).mul_(da)
        da = torch.addcmul(da, da, scale)
    dx = layer_norm_backward(da, h, mean, rstd, weight, sums[0, 0] if args.need_affine else None)
    for other in (args.dh, args.dy):
        dx = dx if other is None else dx.add_(other)
    return dx, absent(h), absent(h), absent(h), absent(h), dscale, sums


class _Chunk(NamedTuple):
    batch: int
    modality: int  # 0: video, 1: text
    rows: slice  # of the batch row
    tokens: slice  # of the modality

    def of(self, x: Tensor) -> Tensor:
        """Its rows of ``x`` [B, T, D]."""
        return x[self.batch, self.rows]

    def sums(self, x: Tensor) -> Tensor:
        """Where in ``x`` [modalities, B or 1, 1 to 3, D] its sums over columns are added."""
        return x[self.modality, self.batch % x.shape[1]]

    def vector(self, vectors: list[Tensor]) -> Tensor | None:
        """Its vector [1, D], or [rows, D] if every token has its own."""
        if not vectors:
            return None
        v = vectors[self.modality % len(vectors)]
        v = v[self.batch % len(v)]
        return v[self.tokens] if len(v) > 1 else v


def _chunks(x: Tensor, text_length: int) -> Iterator[_Chunk]:
    n_batch, n_tokens, n_cols = x.shape
    step = rows_per_chunk(n_cols)
    for batch in range(n_batch):
        for modality, first, end in ((1, 0, text_length), (0, text_length, n_tokens)):
            for start in range(first, end, step):
                stop = min(start + step, end)
                tokens = slice(start - first, stop - first)
                yield _Chunk(batch, modality, slice(start, stop), tokens)


def _forward_by_chunks(
    args: Forward,
    h_out: Tensor | None,
    a_out: Tensor | None,
    total_out: Tensor | None,
    y_out: Tensor | None,
    stats_out: Tensor | None,
) -> None:
    """Fills the outputs that are there."""
    is_rms, acc = args.norm == "rms", accumulator(args.x)
    is_per_token = has_vector_per_token([*args.gate, *args.scale, *args.shift])
    weight, bias = (None if v is None else v.to(acc) for v in (args.weight, args.bias))
    if args.cache_gate is None:
        y_out = h_out
    for chunk in _chunks(args.x, args.text_length):
        y = chunk.of(args.x)
        if args.f is not None:
            out = None if y_out is None else chunk.of(y_out)
            y = _add_gated(y, chunk.vector(args.gate), chunk.of(args.f), out)
        h = y
        if args.cache_gate is not None:
            assert h_out is not None
            out = None if total_out is None else chunk.of(total_out)
            total = _total(chunk, args.entries, y, args.sum_dtype, out)
            h = _mix(total, y, args.cache_gate.item(), args.n_entries, chunk.of(h_out))
        if a_out is not None and stats_out is not None:
            m = _fold(chunk, weight, bias, args.scale, args.shift, is_per_token, acc)
            a = chunk.of(a_out)
            stats = stats_out[:, chunk.batch, chunk.rows]
            if m.factor is None and m.shift is None:
                _fill_norm(a, stats, h, m.weight, m.bias, is_rms, args.eps)
                continue
            n, mean, rstd = normalize(h.to(acc), m.weight, m.bias, is_rms, args.eps)
            fill_stats(stats, mean, rstd, is_rms)
            n = n if m.factor is None else n.mul_(m.factor)
            a.copy_(n) if m.shift is None else torch.add(n, m.shift, out=a)


def _backward_by_chunks(
    args: Backward,
    dx_out: Tensor,
    df_out: Tensor | None,
    dentries_out: Tensor | None,
    dcache_gate_out: Tensor | None,
    dgate_out: Tensor | None,
    dscale_out: Tensor | None,
    sums_out: Tensor | None,
) -> None:
    """Fills the outputs that are there."""
    acc = accumulator(args.y)
    is_per_token = has_vector_per_token([*args.gate, *args.scale])
    norm_backward = rms_norm_backward if args.norm == "rms" else layer_norm_backward
    weight, bias = (None if v is None else v.to(acc) for v in (args.weight, args.bias))
    for out in (sums_out, dcache_gate_out):
        if out is not None:
            out.zero_()
    for chunk in _chunks(args.y, args.text_length):
        y = h = chunk.of(args.y)
        total = None
        if args.cache_gate is not None:
            total = _total(chunk, args.entries, y, args.sum_dtype, None)
            h = _mix(total, y, args.cache_gate.item(), args.n_entries, None)
        dh = None if args.dh is None else chunk.of(args.dh).to(acc)
        sums = None if sums_out is None else chunk.sums(sums_out)
        if args.da is not None and args.stats is not None:
            m = _fold(chunk, weight, None, args.scale, [], is_per_token, acc)
            mean, rstd = args.stats[:, chunk.batch, chunk.rows, None]
            h, da = h.to(acc), chunk.of(args.da).to(acc)
            if dscale_out is not None:
                n = normalize_again(h, mean, rstd, weight, bias)
                torch.mul(da, n, out=chunk.of(dscale_out))
            if m.factor is not None:
                da = da * m.factor
            dnorm = norm_backward(da, h, mean, rstd, m.weight, sums if args.need_affine else None)
            dh = dnorm if dh is None else dnorm.add_(dh)
        if dh is None:
            dh = torch.zeros_like(h, dtype=acc)
        if total is None:
            dy = dh
        else:
            assert args.cache_gate is not None and dcache_gate_out is not None
            g = args.cache_gate.item()
            difference = torch.add(y.to(acc), total, alpha=-1 / args.n_entries)
            dcache_gate_out -= (dh * difference).sum()
            if args.dtotal is None:
                dtotal = dh * (g / args.n_entries)
            else:
                dtotal = torch.add(chunk.of(args.dtotal), dh, alpha=g / args.n_entries)
            if dentries_out is not None:
                chunk.of(dentries_out).copy_(dtotal)
            dy = dtotal.add_(dh, alpha=1 - g)
        if args.dy is not None:
            dy = dy + chunk.of(args.dy)
        chunk.of(dx_out).copy_(dy)
        if df_out is not None:
            torch.mul(dy, chunk.vector(args.gate), out=chunk.of(df_out))  # pyright: ignore
        if args.f is not None:
            if dgate_out is not None:
                torch.mul(dy, chunk.of(args.f), out=chunk.of(dgate_out))
            elif sums is not None:
                sums[-1] += (dy * chunk.of(args.f)).sum(dim=0)


def _add_gated(x: Tensor, gate: Tensor | None, f: Tensor, out: Tensor | None) -> Tensor:
    """x + gate * f, rounded once, to the dtype of x."""
    out = torch.empty_like(x) if out is None else out
    return torch.add(x, f, out=out) if gate is None else torch.addcmul(x, gate, f, out=out)


def _total(
    chunk: _Chunk, entries: list[Tensor], y: Tensor, dtype: torch.dtype, out: Tensor | None
) -> Tensor:
    """The entries and y added one by one in ``dtype``, as a running sum adds them."""
    total = chunk.of(entries[0]).to(dtype)
    for entry in entries[1:]:
        total = torch.add(total, chunk.of(entry))
    return torch.add(total, y, out=out)


def _mix(total: Tensor, y: Tensor, g: float, n_entries: int, out: Tensor | None) -> Tensor:
    """(g / n) * total + (1 - g) * y, rounded once, to the dtype of y."""
    acc = accumulator(total)
    if acc == y.dtype:
        return torch.mul(total, g / n_entries, out=out).add_(y, alpha=1 - g)
    h = torch.mul(total.to(acc), g / n_entries).add_(y, alpha=1 - g)
    return h.to(y.dtype) if out is None else out.copy_(h)


class _Folded(NamedTuple):
    """(xhat * weight + bias) * factor + shift; the last two are None or per token."""

    weight: Tensor | None
    bias: Tensor | None
    factor: Tensor | None
    shift: Tensor | None


def _fold(
    chunk: _Chunk,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: list[Tensor],
    shift: list[Tensor],
    is_per_token: bool,
    acc: torch.dtype,
) -> _Folded:
    """A scale and shift that all rows of the chunk share become part of weight and bias."""
    factor, shift_ = chunk.vector(scale), chunk.vector(shift)
    factor = None if factor is None else factor.to(acc) + 1
    shift_ = None if shift_ is None else shift_.to(acc)
    if is_per_token:
        return _Folded(weight, bias, factor, shift_)
    if factor is not None:
        weight = factor[0] if weight is None else weight * factor[0]
        bias = None if bias is None else bias * factor[0]
    if shift_ is not None:
        bias = shift_[0] if bias is None else bias + shift_[0]
    return _Folded(weight, bias, None, None)


def _fill_norm(
    a: Tensor, stats: Tensor, h: Tensor, weight: Tensor | None, bias: Tensor | None,
    is_rms: bool, eps: float,
) -> None:  # fmt: skip
    """Norm of ``h``, converted here only if PyTorch's LayerNorm does not do it as it reads.

    A weight in fp32 keeps its statistics in fp32.
    """
    if is_rms or h.dtype != a.dtype:
        h = h.to(stats.dtype)
    elif weight is None and h.dtype != stats.dtype:
        weight = stats.new_ones(h.shape[-1])
    n, mean, rstd = normalize(h, weight, bias, is_rms, eps)
    a.copy_(n)
    fill_stats(stats, mean, rstd, is_rms)
