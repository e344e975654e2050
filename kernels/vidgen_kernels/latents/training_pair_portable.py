"""Training pairs of a pyramid on a CPU: a few planes at a time, which stay in cache."""

import torch
from torch import Tensor

from .pyramid_portable import (
    in_pairs,
    plane_chunks,
    put,
    repeat_columns,
    sum4,
    sum_dtype,
    working_copy,
)


def training_pair_fwd(
    clean: Tensor,
    noise: Tensor,
    sigma: Tensor,
    start_sigma: float,
    end_sigma: float,
    return_endpoints: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """input, target, start and end; the last two are empty unless asked for."""
    n_results = 4 if return_endpoints else 2
    results = [clean.new_empty(clean.shape if i < n_results else 0) for i in range(4)]
    planes = [t.flatten(0, 2) for t in (clean, noise, *results[:n_results])]
    weights = _per_plane(sigma, clean)
    for chunk in plane_chunks(clean):
        x, z, *parts = (t[chunk] for t in planes)
        x, z = x.to(weights.dtype), z.to(weights.dtype)
        input, target, *ends = (working_copy(t, x.dtype) for t in parts)
        start, end = ends or (torch.empty_like(input), torch.empty_like(input))
        torch.mul(z, start_sigma, out=start)
        if start_sigma != 1.0:
            in_pairs(start).add_(repeat_columns(sum4(x, factor=(1 - start_sigma) / 4)))
        torch.mul(x, 1 - end_sigma, out=end).add_(z, alpha=end_sigma)
        torch.sub(start, end, out=target)
        torch.lerp(end, start, weights[chunk], out=input)
        for part, calculated in zip(parts, (input, target, start, end), strict=False):
            put(part, calculated)
    return results[0], results[1], results[2], results[3]


def training_pair_bwd(
    dinput: Tensor | None,
    dtarget: Tensor | None,
    dstart: Tensor | None,
    dend: Tensor | None,
    sigma: Tensor,
    start_sigma: float,
    end_sigma: float,
    clean_dtype: torch.dtype | None,
    noise_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """dclean and dnoise, empty where their dtype is None."""
    upstream = dinput, dtarget, dstart, dend
    like = next(d for d in upstream if d is not None)
    dclean, dnoise = (
        like.new_empty(0 if dtype is None else like.shape, dtype=dtype)
        for dtype in (clean_dtype, noise_dtype)
    )
    weights = _per_plane(sigma, like)
    for chunk in plane_chunks(like):
        parts = [None if d is None else d.flatten(0, 2)[chunk].to(weights.dtype) for d in upstream]
        given = next(d for d in parts if d is not None)
        d, dtarget_ = (torch.zeros_like(given) if d is None else d for d in parts[:2])
        dstart_, dend_ = parts[2:]
        start = torch.addcmul(dtarget_, d, weights[chunk])
        end = d - start
        if dstart_ is not None:
            start += dstart_
        if dend_ is not None:
            end += dend_
        if noise_dtype is not None:
            result = dnoise.flatten(0, 2)[chunk]
            calculated = working_copy(result, start.dtype)
            torch.mul(start, start_sigma, out=calculated).add_(end, alpha=end_sigma)
            put(result, calculated)
        if clean_dtype is not None:
            result = dclean.flatten(0, 2)[chunk]
            calculated = working_copy(result, start.dtype)
            torch.mul(end, 1 - end_sigma, out=calculated)
            if start_sigma != 1.0:
                total = sum4(start, factor=(1 - start_sigma) / 4)
                in_pairs(calculated).add_(repeat_columns(total))
            put(result, calculated)
    return dclean, dnoise


def _per_plane(sigma: Tensor, like: Tensor) -> Tensor:
    """[B] as [B C T, 1, 1], in fp32 or wider."""
    n_planes = like.shape[1:3].numel()
    return sigma.to(sum_dtype(like)).repeat_interleave(n_planes)[:, None, None]
