"""`post_norm_adaln` on a CPU, on chunks of rows that stay cached."""

import torch
from torch import Tensor

from .norms import (
    CHUNK_ELEMENTS,
    fill_stats,
    is_small,
    layer_norm_backward,
    normalize,
    normalize_again,
)
from .post_norm import WHOLE_ELEMENTS, chunks_of_rows


def empty_fwd(x: Tensor, f: Tensor, a_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """out, a, and the mean and rstd [4, B, T] of the rows of f and of out."""
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape, dtype=a_dtype),
        x.new_empty((4, *x.shape[:2]), dtype=_accumulator(x, f)),
    )


def empty_bwd(
    dout, da, out, f, stats, gate, scale, weight, bias,
    need_x, need_f, need_gate, need_scale, need_sums,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, df, dgate, dscale and the sums [2, D]; an empty vector for what is not needed."""
    return (
        out.new_empty(out.shape if need_x else 0),
        f.new_empty(f.shape if need_f else 0),
        f.new_empty(f.shape if need_gate else 0, dtype=f.dtype if gate is None else gate.dtype),
        f.new_empty(f.shape if need_scale else 0, dtype=scale.dtype),
        f.new_empty((2, f.shape[2]) if need_sums else 0, dtype=_accumulator(out, f)),
    )


def _accumulator(x: Tensor, f: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, f.dtype), torch.float32)


def post_norm_adaln_fwd(
    x: Tensor,
    f: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    next_eps: float,
    a_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    if a_dtype == x.dtype and is_small(
        x, f, gate, scale, shift, weight, bias, limit=WHOLE_ELEMENTS
    ):
        n, mean, rstd = normalize(f, weight, bias, False, eps)
        # into n: it is contiguous
        out = n.add_(x) if gate is None else torch.addcmul(x, n, gate, out=n)
        n, next_mean, next_rstd = normalize(out, None, None, False, next_eps)
        stats = torch.cat([mean, rstd, next_mean, next_rstd]).view(4, *x.shape[:2])
        return out, torch.addcmul(shift, n, scale + 1, out=n), stats
    out, a, stats = empty_fwd(x, f, a_dtype)
    acc = stats.dtype
    weight, bias = (None if v is None else v.to(acc) for v in (weight, bias))
    for batch, rows in chunks_of_rows(x, CHUNK_ELEMENTS):
        n, mean, rstd = normalize(f[batch, rows].to(acc), weight, bias, False, eps)
        fill_stats(stats[:2, batch, rows], mean, rstd, False)
        n = n if gate is None else n.mul_(gate[batch, rows])
        out_ = out[batch, rows].copy_(n.add_(x[batch, rows]))
        n, mean, rstd = normalize(out_.to(acc), None, None, False, next_eps)
        fill_stats(stats[2:, batch, rows], mean, rstd, False)
        factor, shift_ = scale[batch, rows].to(acc) + 1, shift[batch, rows]
        torch.addcmul(shift_, n, factor, out=a[batch, rows])
    return out, a, stats


def post_norm_adaln_bwd(
    dout: Tensor | None,
    da: Tensor | None,
    out: Tensor,
    f: Tensor,
    stats: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    need_x: bool,
    need_f: bool,
    need_gate: bool,
    need_scale: bool,
    need_sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    needs = need_x, need_f, need_gate, need_scale, need_sums
    results = empty_bwd(dout, da, out, f, stats, gate, scale, weight, bias, *needs)
    dx, df, dgate, dscale, sums = (
        x if need else None for x, need in zip(results, needs, strict=True)
    )
    acc = stats.dtype
    weight, bias = (None if v is None else v.to(acc) for v in (weight, bias))
    if sums is not None:
        sums.zero_()
    for batch, rows in chunks_of_rows(f, CHUNK_ELEMENTS):
        dout_ = None if dout is None else dout[batch, rows].to(acc)
        if da is not None:
            da_, out_ = da[batch, rows].to(acc), out[batch, rows].to(acc)
            mean, rstd = stats[2:, batch, rows, None]
            if dscale is not None:
                n = normalize_again(out_, mean, rstd, None, None)
                torch.mul(n, da_, out=dscale[batch, rows])
            da_ = da_ * (scale[batch, rows].to(acc) + 1)
            through_norm = layer_norm_backward(da_, out_, mean, rstd, None, None)
            dout_ = through_norm if dout_ is None else through_norm.add_(dout_)
        assert dout_ is not None
        if dx is not None:
            dx[batch, rows] = dout_
        if df is None and dgate is None and sums is None:
            continue
        mean, rstd = stats[:2, batch, rows, None]
        f_ = f[batch, rows].to(acc)
        if dgate is not None:
            n = normalize_again(f_, mean, rstd, weight, bias)
            torch.mul(n, dout_, out=dgate[batch, rows])
        dn = dout_ if gate is None else dout_ * gate[batch, rows]
        df_ = layer_norm_backward(dn, f_, mean, rstd, weight, sums)
        if df is not None:
            df[batch, rows] = df_
    return results
