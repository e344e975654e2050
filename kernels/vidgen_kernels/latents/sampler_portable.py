"""Linear sampler steps on a CPU: a few fused PyTorch calls on pieces that stay in the cache."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

PIECE = 1 << 18  # elements: with shorter pieces, call overhead outweighs saved cache misses


def linear_step_fwd(
    x: Tensor,
    velocity: Tensor,
    uncond: Tensor | None,
    previous: Tensor | None,
    noise: Tensor | None,
    coefficients: Tensor,
    is_update: bool,
    return_x0: bool,
) -> tuple[Tensor, Tensor]:
    """x' and x0; formulas in `sampler.py`."""
    acc = torch.promote_types(x.dtype, torch.float32)
    out = torch.empty_like(x)
    x0 = torch.empty_like(x, dtype=acc) if return_x0 else x.new_empty(0, dtype=acc)
    guidance, c_x, c_v, c_p, c_z, a_x, a_v = coefficients.tolist()
    tensors = [x, velocity, uncond, previous, noise, out, x0 if return_x0 else None]
    for x_, v, u, p, z, out_, x0_ in _pieces(tensors):
        x_, v, u, p, z = _cast([x_, v, u, p, z], acc)
        if u is not None:
            v = torch.lerp(u, v, guidance)
        y = out_ if out_.dtype == acc else torch.empty_like(out_, dtype=acc)
        if is_update:  # rounds the product first, as the kernel and the official Euler step do
            torch.mul(v, c_v, out=y).add_(x_)
        else:
            torch.mul(x_, c_x, out=y).add_(v, alpha=c_v)
        if p is not None:
            y.add_(p, alpha=c_p)
        if z is not None:
            y.add_(z, alpha=c_z)
        if y is not out_:
            out_.copy_(y)
        if x0_ is not None:
            torch.mul(x_, a_x, out=x0_).add_(v, alpha=a_v)
    return out, x0


def linear_step_bwd(
    dout: Tensor | None,
    dx0: Tensor | None,
    coefficients: Tensor,
    *dtypes: torch.dtype | None,
) -> list[Tensor]:
    """``dtypes``: of the gradients of x, velocity, uncond, previous and noise that are wanted."""
    like = dx0 if dout is None else dout
    assert like is not None
    acc = torch.promote_types(like.dtype, torch.float32)
    w, c_x, c_v, c_p, c_z, a_x, a_v = coefficients.tolist()
    scales = [(c_x, a_x), (w * c_v, w * a_v), ((1 - w) * c_v, (1 - w) * a_v), (c_p, 0), (c_z, 0)]
    grads = [None if dtype is None else torch.empty_like(like, dtype=dtype) for dtype in dtypes]
    for dout_, dx0_, *pieces in _pieces([dout, dx0, *grads]):
        dout_, dx0_ = _cast([dout_, dx0_], acc)
        for grad, (c, a) in zip(pieces, scales, strict=True):
            if grad is None:
                continue
            y = grad if grad.dtype == acc else torch.empty_like(grad, dtype=acc)
            torch.mul(*((dx0_, a) if dout is None else (dout_, c)), out=y)
            if dout is not None and dx0 is not None and a != 0:
                y.add_(dx0_, alpha=a)
            if y is not grad:
                grad.copy_(y)
    return [grad for grad in grads if grad is not None]


def _cast(tensors: list[Any], dtype: torch.dtype) -> list[Any]:
    return [x if x is None or x.dtype == dtype else x.to(dtype) for x in tensors]


def _pieces(tensors: list[Any]) -> Iterator[list[Any]]:
    """Cache-sized pieces of all tensors, or all at once if there is no common order to cut."""
    n = next(x.numel() for x in tensors if x is not None)
    if n <= PIECE or not all(x is None or x.is_contiguous() for x in tensors):
        yield tensors
        return
    flat = [None if x is None else x.view(-1) for x in tensors]
    for i in range(0, n, PIECE):
        yield [None if x is None else x[i : i + PIECE] for x in flat]
