"""`post_norm_residual` on a CPU: few rows in one pass, more in chunks that stay in the cache.

A gate that the rows of a batch row share is folded into the weight and bias of PyTorch's LayerNorm,
whose backward then gives the sums over columns.
"""

import torch
from torch import Tensor

from .operands import absent
from .post_norm_operands import Backward, Forward, empty_bwd, empty_fwd, is_per_token
from .rows_portable import (
    chunks_of_rows,
    fill_stats,
    is_small,
    layer_norm_backward,
    normalize,
    normalize_again,
    rms_norm_backward,
    small_layer_norm,
)


def post_norm_residual_fwd(args: Forward) -> tuple[Tensor, Tensor]:
    """What `empty_fwd` allocates, filled."""
    x, f, gate, weight, bias, norm, eps = args
    if norm == "layer" and is_small(f, x, gate, weight, bias):
        n, stats = small_layer_norm(f, weight, bias, None, None, eps)
        n = n.add_(x) if gate is None else torch.addcmul(x, n, gate, out=n)  # out: of n's strides
        return n, stats
    out, stats = empty_fwd(args)
    acc = stats.dtype
    weight, bias = (None if v is None else v.to(acc) for v in (weight, bias))
    for batch, rows in chunks_of_rows(f):
        weight_, bias_, gate_ = weight, bias, None
        if gate is not None and is_per_token(gate):
            gate_ = gate[batch, rows]
        elif gate is not None:
            shared = gate[batch, 0].to(acc)
            weight_ = shared if weight is None else weight * shared
            bias_ = None if bias is None else bias * shared
        f_ = f[batch, rows]
        # PyTorch's LayerNorm converts low precision as it reads, but rounds n; a weight in fp32
        # keeps its statistics in fp32
        is_plain = norm == "layer" and gate_ is None and f.dtype == x.dtype
        if is_plain and weight_ is None:
            weight_ = f.new_ones(f.shape[2], dtype=acc)
        f_ = f_ if is_plain else f_.to(acc)
        n, mean, rstd = normalize(f_, weight_, bias_, norm == "rms", eps)
        fill_stats(stats[:, batch, rows], mean, rstd, norm == "rms")
        x_, out_ = x[batch, rows], out[batch, rows]
        if gate_ is None:
            torch.add(x_, n, out=out_) if x.dtype == n.dtype else out_.copy_(n.add_(x_))
        elif x.dtype == gate_.dtype == acc:
            torch.addcmul(x_, n, gate_, out=out_)
        else:
            out_.copy_(n.mul_(gate_).add_(x_))
    return out, stats


def post_norm_residual_bwd(args: Backward) -> tuple[Tensor, Tensor, Tensor]:
    """What `empty_bwd` allocates, filled."""
    do, f, stats, gate, weight, bias, norm, *_ = args
    weight, bias = (None if v is None else v.to(stats.dtype) for v in (weight, bias))
    is_shared = gate is not None and not is_per_token(gate)
    is_whole = norm == "layer" and do.dtype == f.dtype == stats.dtype and len(f) > 0
    if is_whole and (gate is None or (not is_shared and is_small(f, gate))):
        sums = stats.new_zeros(len(f), 2, f.shape[2]) if args.need_sums else absent(f)
        df, dgate = _rows_backward(
            args, do, f, *stats[..., None], gate, weight, bias, sums[0] if args.need_sums else None
        )
        return absent(f) if df is None else df, absent(f) if dgate is None else dgate, sums
    results = empty_bwd(args)
    df, dgate, sums = results
    if args.need_sums:
        sums.zero_()
    for batch, rows in chunks_of_rows(f):
        gate_, weight_ = gate, weight
        if gate is not None and is_shared:
            shared = gate[batch, 0].to(stats.dtype)
            gate_, weight_ = None, shared if weight is None else weight * shared
        elif gate is not None:
            gate_ = gate[batch, rows]
        found = _rows_backward(
            args, do[batch, rows], f[batch, rows], *stats[:, batch, rows, None],
            gate_, weight_, bias, sums[batch] if args.need_sums else None,
        )  # fmt: skip
        for x, of_rows in zip((df, dgate), found, strict=True):
            if of_rows is not None:
                x[batch, rows] = of_rows
    return results


def _rows_backward(
    args: Backward,
    do: Tensor,
    f: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gate: Tensor | None,  # of each row
    weight: Tensor | None,
    bias: Tensor | None,
    sums: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """df and dgate of rows, if ``args`` needs them; adds to ``sums`` [2, D] what the rows give."""
    if args.norm == "rms" or gate is not None:
        do, f = do.to(rstd.dtype), f.to(rstd.dtype)
    dgate = None
    if gate is not None:
        dgate = normalize_again(f, mean, rstd, weight, bias).mul_(do) if args.need_gate else None
        do = do * gate
    if not (args.need_f or args.need_sums):
        return None, dgate
    backward = rms_norm_backward if args.norm == "rms" else layer_norm_backward
    df = backward(do, f, mean, rstd, weight, sums)
    return df if args.need_f else None, dgate
