"""`post_norm_adaln` on a CPU: few rows in one pass, else on chunks that stay cached."""

import torch
from torch import Tensor

from .post_norm_portable import accumulator, chunks_of_rows
from .residual_norm_portable import (
    fill_stats,
    is_small,
    layer_norm_backward,
    normalize,
    normalize_again,
)


def empty_fwd(x: Tensor, f: Tensor, a_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """out, a, and the mean and rstd [4, B, T] of the rows of f and of out."""
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape, dtype=a_dtype),
        x.new_empty((4, *x.shape[:2]), dtype=accumulator(x, f)),
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
        f.new_empty((2, f.shape[2]) if need_sums else 0, dtype=accumulator(out, f)),
    )


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
    if a_dtype == x.dtype and is_small(x, f, gate, scale, shift, weight, bias):
        n, mean, rstd = normalize(f, weight, bias, False, eps)
        # into n: it is contiguous
        out = n.add_(x) if gate is None else torch.addcmul(x, n, gate, out=n)
        n, next_mean, next_rstd = normalize(out, None, None, False, next_eps)
        stats = torch.cat([mean, rstd, next_mean, next_rstd]).view(4, *x.shape[:2])
        return out, torch.addcmul(shift, n, scale + 1, out=n), stats
    out, a, stats = empty_fwd(x, f, a_dtype)
    acc = stats.dtype
    weight, bias = (None if v is None else v.to(acc) for v in (weight, bias))
    for batch, rows in chunks_of_rows(x):
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
    weight, bias = (None if v is None else v.to(stats.dtype) for v in (weight, bias))
    is_whole = is_small(out, dout, da, f, gate, scale, weight, bias)
    filled = needs if not is_whole else (False, False, False, False, need_sums)
    results = empty_bwd(dout, da, out, f, stats, gate, scale, weight, bias, *filled)
    sums = results[4].zero_() if need_sums else None
    if is_whole:
        found = rows_backward(
            dout, da, out, f, stats[..., None], gate, scale, weight, bias, needs, sums
        )
        parts = zip(results, (*found, sums), strict=True)
        return tuple(x if part is None else part for x, part in parts)  # pyright: ignore
    for batch, rows in chunks_of_rows(f):
        dout_, da_, gate_ = (None if x is None else x[batch, rows] for x in (dout, da, gate))
        out_, f_, scale_ = (x[batch, rows] for x in (out, f, scale))
        stats_ = stats[:, batch, rows, None]
        found = rows_backward(
            dout_, da_, out_, f_, stats_, gate_, scale_, weight, bias, needs, sums
        )
        for x, of_rows in zip(results, found, strict=False):
            if of_rows is not None:
                x[batch, rows] = of_rows
    return results


def rows_backward(
    dout: Tensor | None,
    da: Tensor | None,
    out: Tensor,
    f: Tensor,
    stats: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    needs: tuple[bool, bool, bool, bool, bool],
    sums: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, df, dgate and dscale of all rows; adds what they give to ``sums`` [2, D]."""
    need_x, need_f, need_gate, need_scale, need_sums = needs
    acc = stats.dtype
    mean, rstd, next_mean, next_rstd = stats
    df, dgate, dscale = None, None, None
    dx = None if dout is None else dout.to(acc)
    if da is not None:
        da, out = da.to(acc), out.to(acc)
        if need_scale:
            dscale = normalize_again(out, next_mean, next_rstd, None, None).mul_(da)
        da = torch.addcmul(da, da, scale)
        through_norm = layer_norm_backward(da, out, next_mean, next_rstd, None, None)
        dx = through_norm if dx is None else through_norm.add_(dx)
    assert dx is not None
    f = f.to(acc)
    if need_gate:
        dgate = normalize_again(f, mean, rstd, weight, bias).mul_(dx)
    if need_f or need_sums:
        dn = dx if gate is None else dx * gate
        df = layer_norm_backward(dn, f, mean, rstd, weight, sums)
    return dx if need_x else None, df if need_f else None, dgate, dscale
