"""`post_norm_adaln` on a CPU: few rows in one pass, more in chunks that stay in the cache."""

import torch
from torch import Tensor

from .operands import absent
from .post_norm_adaln_operands import Backward, Forward, empty_bwd, empty_fwd
from .rows_portable import (
    chunks_of_rows,
    fill_stats,
    is_small,
    layer_norm_backward,
    normalize,
    normalize_again,
)


def post_norm_adaln_fwd(args: Forward) -> tuple[Tensor, Tensor, Tensor]:
    """What `empty_fwd` allocates, filled."""
    x, f, gate, scale, shift, weight, bias, eps, next_eps, a_dtype = args
    if a_dtype == x.dtype and is_small(x, f, gate, scale, shift, weight, bias):
        n, mean, rstd = normalize(f, weight, bias, False, eps)
        out = n.add_(x) if gate is None else torch.addcmul(x, n, gate, out=n)
        n, next_mean, next_rstd = normalize(out, None, None, False, next_eps)
        stats = torch.cat([mean, rstd, next_mean, next_rstd]).view(4, *x.shape[:2])
        return out, torch.addcmul(shift, n, scale + 1, out=n), stats
    out, a, stats = empty_fwd(args)
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


def post_norm_adaln_bwd(args: Backward) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `empty_bwd` allocates, filled."""
    dout, da, out, f, stats, gate, scale, weight, bias, *_ = args
    weight, bias = (None if v is None else v.to(stats.dtype) for v in (weight, bias))
    if is_small(out, dout, da, f, gate, scale, weight, bias):
        sums = stats.new_zeros(2, f.shape[2]) if args.need_sums else None
        found = _rows_backward(
            args, dout, da, out, f, stats[..., None], gate, scale, weight, bias, sums
        )
        return tuple([absent(f) if x is None else x for x in (*found, sums)])  # pyright: ignore
    results = empty_bwd(args)
    sums = results[4].zero_() if args.need_sums else None
    for batch, rows in chunks_of_rows(f):
        dout_, da_, gate_ = (None if x is None else x[batch, rows] for x in (dout, da, gate))
        out_, f_, scale_ = (x[batch, rows] for x in (out, f, scale))
        stats_ = stats[:, batch, rows, None]
        found = _rows_backward(
            args, dout_, da_, out_, f_, stats_, gate_, scale_, weight, bias, sums
        )
        for x, of_rows in zip(results, found, strict=False):
            if of_rows is not None:
                x[batch, rows] = of_rows
    return results


def _rows_backward(
    args: Backward,
    dout: Tensor | None,
    da: Tensor | None,
    out: Tensor,
    f: Tensor,
    stats: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sums: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, df, dgate and dscale of rows, if ``args`` needs them; adds to ``sums`` [2, D]."""
    acc = stats.dtype
    mean, rstd, next_mean, next_rstd = stats
    df, dgate, dscale = None, None, None
    dx = None if dout is None else dout.to(acc)
    if da is not None:
        da, out = da.to(acc), out.to(acc)
        if args.need_scale:
            dscale = normalize_again(out, next_mean, next_rstd, None, None).mul_(da)
        da = torch.addcmul(da, da, scale)
        through_norm = layer_norm_backward(da, out, next_mean, next_rstd, None, None)
        dx = through_norm if dx is None else through_norm.add_(dx)
    assert dx is not None
    f = f.to(acc)
    if args.need_gate:
        dgate = normalize_again(f, mean, rstd, weight, bias).mul_(dx)
    if args.need_f or args.need_sums:
        dn = dx if gate is None else dx * gate
        df = layer_norm_backward(dn, f, mean, rstd, weight, sums)
    return dx if args.need_x else None, df if args.need_f else None, dgate, dscale
