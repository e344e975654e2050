"""Residual, feature cache, norm and modulation on a CPU, on chunks of rows that stay cached.

A LayerNorm of few rows, and the gradient of a plain one, are one pass over all of them. A chunk
holds tokens of one batch row and one modality, so its vectors are rows [1, D]; weight, scale, bias
and shift fold into one product and one sum, which PyTorch's LayerNorm takes as its own. Its
backward gives the sums over columns as well.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**19  # 2 MB in fp32: calls cost more than a larger cache saves
WHOLE_ELEMENTS = 2**22  # up to here new memory for every chunk costs more than a cache saves

_layer_norm = torch.native_layer_norm
_layer_norm_backward = torch.ops.aten.native_layer_norm_backward.default


class Chunk(NamedTuple):
    batch: int
    modality: int  # 0: video, 1: text
    rows: slice  # of the batch row
    tokens: slice  # of the modality

    def of(self, x: Tensor) -> Tensor:
        return x[self.batch, self.rows]

    def sums(self, x: Tensor) -> Tensor:
        """Where the sums over columns go: one place where all batch rows share their vectors."""
        return x[self.modality, self.batch % x.shape[1]]

    def vector(self, vectors: list[Tensor]) -> Tensor | None:
        """[1, D], or [rows, D] where every token has its own."""
        if not vectors:
            return None
        v = vectors[self.modality % len(vectors)]
        v = v[self.batch % len(v)]
        return v[self.tokens] if len(v) > 1 else v


class Modulation(NamedTuple):
    """``xhat * weight + bias``, times ``1 + scale``, plus ``shift``; the latter two per token."""

    weight: Tensor | None
    bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """PyTorch's own, and its mean and rstd [2, B, T]. A weight in fp32 keeps these there."""
    acc = torch.promote_types(x.dtype, torch.float32)
    weight, bias = (None if v is None else v.to(acc) for v in (weight, bias))
    if weight is None and x.dtype != acc:
        weight = x.new_ones(x.shape[-1], dtype=acc)
    x = x if x.dtype == dtype else x.to(acc)
    a, mean, rstd = _layer_norm(x, x.shape[-1:], weight, bias, eps)
    return a.to(dtype), stack_stats(mean, rstd)


def stack_stats(mean: Tensor, rstd: Tensor) -> Tensor:
    """[2, B, T] of two [B, T, 1]."""
    return torch.cat([mean, rstd]).view(2, *mean.shape[:-1])


def small_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None,
    shift: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`layer_norm`, modulated, where `is_small`: its calls cost more than they compute."""
    a, mean, rstd = _layer_norm(x, x.shape[-1:], weight, bias, eps)
    if scale is not None and scale.shape[1] != 1:
        a.addcmul_(a, scale)  # no memory for 1 + scale of every token
    elif scale is not None:
        scale = scale + 1
        if shift is not None:  # rounded once, as where it is folded into LayerNorm's weights
            return torch.addcmul(shift, a, scale, out=a), stack_stats(mean, rstd)
        a.mul_(scale)
    if shift is not None:
        a.add_(shift)
    return a, stack_stats(mean, rstd)


def is_small(x: Tensor, *others: Tensor | None) -> bool:
    """Few elements, of one wide dtype."""
    dtype = x.dtype
    if dtype not in (torch.float32, torch.float64) or x.numel() > WHOLE_ELEMENTS:
        return False
    return all([v is None or v.dtype == dtype for v in others])


def residual_norm_fwd(
    h_out: Tensor | None,
    a_out: Tensor | None,
    total_out: Tensor | None,
    y_out: Tensor | None,
    stats_out: Tensor | None,  # [2, B, T]: mean, rstd
    x: Tensor,
    f: Tensor | None,
    entries: list[Tensor],
    cache_gate: Tensor | None,
    gate: list[Tensor],
    scale: list[Tensor],
    shift: list[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    text_length: int,
    n_entries: int,
    is_rms: bool,
    eps: float,
    sum_dtype: torch.dtype,
) -> None:
    """Fills the outputs that are wanted."""
    acc = torch.promote_types(x.dtype, torch.float32)
    is_per_token = has_vector_per_token([*gate, *scale, *shift])
    weight, bias = (None if v is None else v.to(acc) for v in (weight, bias))
    if cache_gate is None:
        y_out = h_out
    for chunk in _chunks(x, text_length):
        y = chunk.of(x)
        if f is not None:
            out = None if y_out is None else chunk.of(y_out)
            y = _add_gated(y, chunk.vector(gate), chunk.of(f), out)
        h = y
        if cache_gate is not None:
            assert h_out is not None
            out = None if total_out is None else chunk.of(total_out)
            total = _total(chunk, entries, y, sum_dtype, out)
            h = _mix(total, y, cache_gate.item(), n_entries, chunk.of(h_out))
        if a_out is not None and stats_out is not None:
            m = _modulation(chunk, weight, bias, scale, shift, is_per_token, acc)
            a = chunk.of(a_out)
            stats = stats_out[:, chunk.batch, chunk.rows]
            if m.scale is None and m.shift is None:
                _fill_norm(a, stats, h, m.weight, m.bias, is_rms, eps)
                continue
            n, mean, rstd = normalize(h.to(acc), m.weight, m.bias, is_rms, eps)
            fill_stats(stats, mean, rstd, is_rms)
            n = n if m.scale is None else n.mul_(m.scale)
            a.copy_(n) if m.shift is None else torch.add(n, m.shift, out=a)


def layer_norm_gradients(
    sums: Tensor | None,
    dh: Tensor | None,
    da: Tensor,
    dy: Tensor | None,
    h: Tensor,
    stats: Tensor,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    need_scale: bool,
) -> tuple[Tensor, Tensor | None]:
    """dx and dscale of a LayerNorm whose ``scale``, if any, has a vector for every token; fills the
    sums [modalities, 1, 2, D]. One pass over all rows."""
    mean, rstd = stats[..., None]
    weight, bias = (None if v is None else v.to(stats.dtype) for v in (weight, bias))
    if sums is not None:
        sums.zero_()
    dscale = None
    if scale is not None:
        if need_scale:
            dscale = normalize_again(h, mean, rstd, weight, bias).mul_(da)
        da = torch.addcmul(da, da, scale)
    dx = layer_norm_backward(da, h, mean, rstd, weight, None if sums is None else sums[0, 0])
    for other in (dh, dy):
        dx = dx if other is None else dx.add_(other)
    return dx, dscale


def residual_norm_bwd(
    dx_out: Tensor,
    df_out: Tensor | None,
    dentries_out: Tensor | None,
    dcache_gate_out: Tensor | None,
    dgate_out: Tensor | None,
    dscale_out: Tensor | None,
    sums_out: Tensor | None,  # [modalities, B or 1, 1 to 3, D]: of da and da * xhat; of dy * f
    dh: Tensor | None,
    da: Tensor | None,
    dtotal: Tensor | None,
    dy: Tensor | None,
    y: Tensor,
    stats: Tensor | None,
    f: Tensor | None,
    entries: list[Tensor],
    cache_gate: Tensor | None,
    gate: list[Tensor],
    scale: list[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    text_length: int,
    n_entries: int,
    is_rms: bool,
    sum_dtype: torch.dtype,
    sum_affine: bool,
) -> None:
    """Fills the outputs that are wanted."""
    acc = torch.promote_types(y.dtype, torch.float32)
    is_per_token = has_vector_per_token([*gate, *scale])
    weight, bias = (None if v is None else v.to(acc) for v in (weight, bias))
    for out in (sums_out, dcache_gate_out):
        if out is not None:
            out.zero_()
    for chunk in _chunks(y, text_length):
        y_ = h = chunk.of(y)
        total = None
        if cache_gate is not None:
            total = _total(chunk, entries, y_, sum_dtype, None)
            h = _mix(total, y_, cache_gate.item(), n_entries, None)
        dh_ = None if dh is None else chunk.of(dh).to(acc)
        sums = None if sums_out is None else chunk.sums(sums_out)
        if da is not None and stats is not None:
            m = _modulation(chunk, weight, None, scale, [], is_per_token, acc)
            mean, rstd = stats[:, chunk.batch, chunk.rows, None]
            h, da_ = h.to(acc), chunk.of(da).to(acc)
            if dscale_out is not None:
                n = normalize_again(h, mean, rstd, weight, bias)
                torch.mul(da_, n, out=chunk.of(dscale_out))
            if m.scale is not None:
                da_ = da_ * m.scale
            backward = rms_norm_backward if is_rms else layer_norm_backward
            dnorm = backward(da_, h, mean, rstd, m.weight, sums if sum_affine else None)
            dh_ = dnorm if dh_ is None else dnorm.add_(dh_)
        if dh_ is None:
            dh_ = torch.zeros_like(h, dtype=acc)
        if total is None:
            dy_ = dh_
        else:
            assert cache_gate is not None and dcache_gate_out is not None
            g = cache_gate.item()
            difference = torch.add(y_.to(acc), total, alpha=-1 / n_entries)
            dcache_gate_out -= (dh_ * difference).sum()
            if dtotal is None:
                dtotal_ = dh_ * (g / n_entries)
            else:
                dtotal_ = torch.add(chunk.of(dtotal), dh_, alpha=g / n_entries)
            if dentries_out is not None:
                chunk.of(dentries_out).copy_(dtotal_)
            dy_ = dtotal_.add_(dh_, alpha=1 - g)
        if dy is not None:
            dy_ = dy_ + chunk.of(dy)
        chunk.of(dx_out).copy_(dy_)
        if df_out is not None:
            torch.mul(dy_, chunk.vector(gate), out=chunk.of(df_out))  # pyright: ignore
        if f is not None:
            if dgate_out is not None:
                torch.mul(dy_, chunk.of(f), out=chunk.of(dgate_out))
            elif sums is not None:
                sums[-1] += (dy_ * chunk.of(f)).sum(dim=0)


def has_vector_per_token(vectors: list[Tensor]) -> bool:
    return any(v.shape[1] != 1 for v in vectors)


def _chunks(x: Tensor, text_length: int) -> Iterator[Chunk]:
    n_batch, n_tokens, n_cols = x.shape
    step = max(1, CHUNK_ELEMENTS // n_cols)
    for batch in range(n_batch):
        for modality, first, end in ((1, 0, text_length), (0, text_length, n_tokens)):
            for start in range(first, end, step):
                stop = min(start + step, end)
                tokens = slice(start - first, stop - first)
                yield Chunk(batch, modality, slice(start, stop), tokens)


def _add_gated(x: Tensor, gate: Tensor | None, f: Tensor, out: Tensor | None) -> Tensor:
    """x + gate * f, rounded once, to the dtype of x."""
    out = torch.empty_like(x) if out is None else out
    return torch.add(x, f, out=out) if gate is None else torch.addcmul(x, gate, f, out=out)


def _total(
    chunk: Chunk, entries: list[Tensor], y: Tensor, dtype: torch.dtype, out: Tensor | None
) -> Tensor:
    """The entries and y added one by one in ``dtype``, as the running sum was."""
    total = chunk.of(entries[0]).to(dtype)
    for entry in entries[1:]:
        total = torch.add(total, chunk.of(entry))
    return torch.add(total, y, out=out)


def _mix(total: Tensor, y: Tensor, g: float, n_entries: int, out: Tensor | None) -> Tensor:
    """(g / n) * total + (1 - g) * y, rounded once, to the dtype of y."""
    acc = torch.promote_types(total.dtype, torch.float32)
    if acc == y.dtype:
        return torch.mul(total, g / n_entries, out=out).add_(y, alpha=1 - g)
    h = torch.mul(total.to(acc), g / n_entries).add_(y, alpha=1 - g)
    return h.to(y.dtype) if out is None else out.copy_(h)


def _modulation(
    chunk: Chunk,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: list[Tensor],
    shift: list[Tensor],
    is_per_token: bool,
    acc: torch.dtype,
) -> Modulation:
    """What all rows of the chunk share is folded into weight and bias; ``scale`` includes the 1."""
    factor, shift_ = chunk.vector(scale), chunk.vector(shift)
    factor = None if factor is None else factor.to(acc) + 1
    shift_ = None if shift_ is None else shift_.to(acc)
    if is_per_token:
        return Modulation(weight, bias, factor, shift_)
    if factor is not None:
        weight = factor[0] if weight is None else weight * factor[0]
        bias = None if bias is None else bias * factor[0]
    if shift_ is not None:
        bias = shift_[0] if bias is None else bias + shift_[0]
    return Modulation(weight, bias, None, None)


def normalize(
    h: Tensor, weight: Tensor | None, bias: Tensor | None, is_rms: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of h normalised, times weight, plus bias; their mean and rstd, of no use for rms."""
    if not is_rms:
        return _layer_norm(h, h.shape[-1:], weight, bias, eps)
    rstd = torch.linalg.vector_norm(h, dim=-1, keepdim=True).square_()
    rstd = rstd.div_(h.shape[-1]).add_(eps).rsqrt_()
    a = h * rstd
    a = a if weight is None else a.mul_(weight)
    return (a if bias is None else a.add_(bias)), rstd, rstd


def _fill_norm(
    a: Tensor, stats: Tensor, h: Tensor, weight: Tensor | None, bias: Tensor | None,
    is_rms: bool, eps: float,
) -> None:  # fmt: skip
    """PyTorch's LayerNorm converts low precision as it reads; with a weight in fp32 it keeps the
    statistics there."""
    if is_rms or h.dtype != a.dtype:
        h = h.to(stats.dtype)
    elif weight is None and h.dtype != stats.dtype:
        weight = stats.new_ones(h.shape[-1])
    n, mean, rstd = normalize(h, weight, bias, is_rms, eps)
    a.copy_(n)
    fill_stats(stats, mean, rstd, is_rms)


def normalize_again(
    h: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """What `normalize` made of rows h, from their mean and rstd: contiguous, whatever h is."""
    n = torch.sub(h, mean, out=h.new_empty(h.shape)).mul_(rstd)
    n = n if weight is None else n.mul_(weight)
    return n if bias is None else n.add_(bias)


def fill_stats(stats: Tensor, mean: Tensor, rstd: Tensor, is_rms: bool) -> None:
    stats[0] = 0 if is_rms else mean.squeeze(-1)
    stats[1] = rstd.squeeze(-1)


def layer_norm_backward(
    da: Tensor, h: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, sums: Tensor | None
) -> Tensor:
    """The gradient of rows h; adds the sums of da and da * xhat to ``sums`` [2 or 3, D].

    PyTorch reads low precision as it is, but would also sum in it.
    """
    if da.dtype != h.dtype or sums is not None:
        da, h = da.to(mean.dtype), h.to(mean.dtype)
    if weight is None and (sums is not None or h.dtype != mean.dtype):
        weight = mean.new_ones(h.shape[-1])
    wanted = [True, sums is not None, sums is not None]
    dh, sum_da_xhat, sum_da = _layer_norm_backward(
        da, h, h.shape[-1:], mean, rstd, weight, weight, wanted
    )
    if sums is not None:
        sums[0] += sum_da
        sums[1] += sum_da_xhat
    return dh


def rms_norm_backward(
    da: Tensor, h: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, sums: Tensor | None
) -> Tensor:
    """As `layer_norm_backward`; da and h in the dtype of rstd, ``mean`` is 0."""
    xhat = h * rstd
    dxhat = da if weight is None else da * weight
    along = (dxhat * xhat).sum(dim=-1, keepdim=True).div_(h.shape[-1])
    if sums is not None:
        sums[0] += da.sum(dim=0)
        sums[1] += (da * xhat).sum(dim=0)
    return torch.addcmul(dxhat, xhat, along, value=-1).mul_(rstd)
