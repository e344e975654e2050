"""Norms of rows on a CPU, forward and backward: what the CPU forms of this family share.

Few rows take one pass, as each call of PyTorch costs more than it computes. More are taken in
chunks that stay in the cache from one call to the next. Statistics and sums are in fp32 or wider.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**19  # 2 MB in fp32: in smaller chunks, calls cost more than the cache saves
WHOLE_ELEMENTS = 2**22  # up to here, allocating for each chunk costs more than the cache saves

_layer_norm = torch.native_layer_norm
_layer_norm_backward = torch.ops.aten.native_layer_norm_backward.default


def is_small(x: Tensor, *others: Tensor | None) -> bool:
    """Whether one pass over all rows is fastest: there are few, and all are fp32, or all fp64."""
    dtype = x.dtype
    if dtype not in (torch.float32, torch.float64) or x.numel() > WHOLE_ELEMENTS:
        return False
    return all([v is None or v.dtype == dtype for v in others])


def rows_per_chunk(n_cols: int) -> int:
    return max(1, CHUNK_ELEMENTS // n_cols)


def chunks_of_rows(x: Tensor) -> Iterator[tuple[int, slice]]:
    """Each batch row of ``x`` [B, T, D] and the slices of its rows."""
    n_batch, n_tokens, n_cols = x.shape
    step = rows_per_chunk(n_cols)
    for batch in range(n_batch):
        for start in range(0, n_tokens, step):
            yield batch, slice(start, min(start + step, n_tokens))


def normalize(
    h: Tensor, weight: Tensor | None, bias: Tensor | None, is_rms: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """norm(h) * weight + bias, and the mean and rstd [..., 1]; for RMSNorm that mean is unused."""
    if not is_rms:
        return _layer_norm(h, h.shape[-1:], weight, bias, eps)
    rstd = torch.linalg.vector_norm(h, dim=-1, keepdim=True).square_()
    rstd = rstd.div_(h.shape[-1]).add_(eps).rsqrt_()
    a = h * rstd
    a = a if weight is None else a.mul_(weight)
    return (a if bias is None else a.add_(bias)), rstd, rstd


def normalize_again(
    h: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """`normalize` from known mean and rstd. The result is contiguous, whatever ``h`` is."""
    n = torch.sub(h, mean, out=h.new_empty(h.shape)).mul_(rstd)
    n = n if weight is None else n.mul_(weight)
    return n if bias is None else n.add_(bias)


def small_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None,
    shift: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(LN(x) * weight + bias) * (1 + scale) + shift of rows that are `is_small`; their stats."""
    a, mean, rstd = _layer_norm(x, x.shape[-1:], weight, bias, eps)
    if scale is not None and scale.shape[1] != 1:
        a.addcmul_(a, scale)  # 1 + scale of every token would take memory
    elif scale is not None:
        scale = scale + 1
        if shift is not None:  # rounded once, as if folded into the weight and bias of LayerNorm
            return torch.addcmul(shift, a, scale, out=a), stack_stats(mean, rstd)
        a.mul_(scale)
    if shift is not None:
        a.add_(shift)
    return a, stack_stats(mean, rstd)


def stack_stats(mean: Tensor, rstd: Tensor) -> Tensor:
    """[2, B, T] of two [B, T, 1]."""
    return torch.cat([mean, rstd]).view(2, *mean.shape[:-1])


def fill_stats(stats: Tensor, mean: Tensor, rstd: Tensor, is_rms: bool) -> None:
    """Writes mean (0 for RMSNorm) and rstd, both [rows, 1], to ``stats`` [2, rows]."""
    stats[0] = 0 if is_rms else mean.squeeze(-1)
    stats[1] = rstd.squeeze(-1)


def layer_norm_backward(
    da: Tensor, h: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, sums: Tensor | None
) -> Tensor:
    """The gradient of rows ``h``; adds the sums of da and da * xhat to ``sums`` [2 or 3, D].

    PyTorch takes low precision as it is, but would then sum over the rows in low precision too.
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
    """As `layer_norm_backward`; da and h have the dtype of rstd, ``mean`` is not used."""
    xhat = h * rstd
    dxhat = da if weight is None else da * weight
    along = (dxhat * xhat).sum(dim=-1, keepdim=True).div_(h.shape[-1])
    if sums is not None:
        sums[0] += da.sum(dim=0)
        sums[1] += (da * xhat).sum(dim=0)
    return torch.addcmul(dxhat, xhat, along, value=-1).mul_(rstd)
