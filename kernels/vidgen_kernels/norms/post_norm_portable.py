"""`post_norm_residual` on a CPU: few rows in one pass, else on chunks that stay cached.

A gate that the rows of a batch row share folds into weight and bias, which PyTorch's LayerNorm
takes as its own. Its backward gives the sums over columns as well.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .residual_norm_portable import (
    CHUNK_ELEMENTS,
    fill_stats,
    is_small,
    layer_norm_backward,
    normalize,
    normalize_again,
    rms_norm_backward,
    small_layer_norm,
)


def empty_fwd(x: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    """out, and the mean and rstd [2, B, T] of the rows of f."""
    return x.new_empty(x.shape), x.new_empty((2, *x.shape[:2]), dtype=accumulator(x, f))


def empty_bwd(
    do, f, stats, gate, weight, bias, norm, need_f, need_gate, need_sums
) -> tuple[Tensor, Tensor, Tensor]:
    """df, dgate and the sums [B, 2, D]; an empty vector for what is not needed."""
    return (
        f.new_empty(f.shape if need_f else 0),
        f.new_empty(f.shape if need_gate else 0, dtype=f.dtype if gate is None else gate.dtype),
        f.new_empty((len(f), 2, f.shape[2]) if need_sums else 0, dtype=accumulator(do, f)),
    )


def accumulator(x: Tensor, f: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, f.dtype), torch.float32)


def is_per_token(gate: Tensor | None) -> bool:
    return gate is not None and gate.shape[1] != 1


def post_norm_residual_fwd(
    x: Tensor,
    f: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    if norm == "layer" and is_small(f, x, gate, weight, bias):
        n, stats = small_layer_norm(f, weight, bias, None, None, eps)
        n = n.add_(x) if gate is None else torch.addcmul(x, n, gate, out=n)  # out: of n's strides
        return n, stats
    out, stats = empty_fwd(x, f)
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
        # PyTorch's LayerNorm converts low precision as it reads, and rounds once more; a weight in
        # fp32 keeps the statistics there
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


def post_norm_residual_bwd(
    do: Tensor,
    f: Tensor,
    stats: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    need_f: bool,
    need_gate: bool,
    need_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    needs = need_f, need_gate, need_sums
    weight, bias = (None if v is None else v.to(stats.dtype) for v in (weight, bias))
    is_shared = gate is not None and not is_per_token(gate)
    is_whole = norm == "layer" and do.dtype == f.dtype == stats.dtype and len(f) > 0
    if is_whole and (gate is None or (not is_shared and is_small(f, gate))):
        df, dgate, sums = empty_bwd(do, f, stats, gate, weight, bias, norm, False, False, need_sums)
        sums_ = sums.zero_()[0] if need_sums else None
        df_, dgate_ = rows_backward(
            do, f, *stats[..., None], gate, weight, bias, norm, needs, sums_
        )
        return df if df_ is None else df_, dgate if dgate_ is None else dgate_, sums
    results = empty_bwd(do, f, stats, gate, weight, bias, norm, *needs)
    df, dgate, sums = results
    if need_sums:
        sums.zero_()
    for batch, rows in chunks_of_rows(f):
        gate_, weight_ = gate, weight
        if gate is not None and is_shared:
            shared = gate[batch, 0].to(stats.dtype)
            gate_, weight_ = None, shared if weight is None else weight * shared
        elif gate is not None:
            gate_ = gate[batch, rows]
        found = rows_backward(
            do[batch, rows], f[batch, rows], *stats[:, batch, rows, None], gate_, weight_, bias,
            norm, needs, sums[batch] if need_sums else None,
        )  # fmt: skip
        for x, of_rows in zip((df, dgate), found, strict=True):
            if of_rows is not None:
                x[batch, rows] = of_rows
    return results


def rows_backward(
    do: Tensor,
    f: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gate: Tensor | None,  # of each row
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    needs: tuple[bool, bool, bool],
    sums: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """df and dgate of all rows; adds what they give to ``sums`` [2, D]."""
    need_f, need_gate, need_sums = needs
    if norm == "rms" or gate is not None:
        do, f = do.to(rstd.dtype), f.to(rstd.dtype)
    dgate = None
    if gate is not None:
        dgate = normalize_again(f, mean, rstd, weight, bias).mul_(do) if need_gate else None
        do = do * gate
    if not (need_f or need_sums):
        return None, dgate
    backward = rms_norm_backward if norm == "rms" else layer_norm_backward
    df = backward(do, f, mean, rstd, weight, sums)
    return df if need_f else None, dgate


def chunks_of_rows(x: Tensor) -> Iterator[tuple[int, slice]]:
    n_batch, n_tokens, n_cols = x.shape
    step = max(1, CHUNK_ELEMENTS // n_cols)
    for batch in range(n_batch):
        for start in range(0, n_tokens, step):
            yield batch, slice(start, min(start + step, n_tokens))
