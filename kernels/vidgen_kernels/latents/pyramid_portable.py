"""Pyramid resampling on a CPU, a few planes [H, W] at a time, so that intermediates stay in cache.

Rows are added first, then columns: plain strided sums are many times faster than PyTorch's pooling
or interpolation over 2 x 2 blocks. Sums are in fp32 or wider. Formulas: `pyramid.py`.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .philox_portable import normals

CHUNK = 1 << 19  # pixels of the higher resolution


def downsample_fwd(x: Tensor, factor: float) -> Tensor:
    height, width = x.shape[3:]
    y = x.new_empty(*x.shape[:3], height // 2, width // 2)
    planes, results = x.flatten(0, 2), y.flatten(0, 2)
    for chunk in plane_chunks(x):
        part = planes[chunk].to(sum_dtype(x))
        if height % 2 == width % 2 == 0:
            sum4(part, out=results[chunk], factor=factor / 4)
            continue
        for dim in (1, 2):
            first, weight = _sources(part.shape[dim], dim, part.dtype)
            corners = (part.index_select(dim, first + i) for i in (0, 1))
            part = torch.lerp(*corners, weight)
        results[chunk] = part.mul_(factor)
    return y


def downsample_bwd(dy: Tensor, height: int, width: int, factor: float) -> Tensor:
    dx = dy.new_empty(*dy.shape[:3], height, width)
    planes, results = dy.flatten(0, 2), dx.flatten(0, 2)
    for chunk in plane_chunks(dx):
        part = planes[chunk].to(sum_dtype(dy))
        if height % 2 == width % 2 == 0:
            in_pairs(results[chunk]).copy_(repeat_columns(part * (factor / 4)))
            continue
        for dim, size in ((2, width), (1, height)):
            first, weight = _sources(size, dim, part.dtype)
            spread = part.new_zeros([size if d == dim else n for d, n in enumerate(part.shape)])
            # An input has at most one reader, so nothing is written twice.
            spread.index_copy_(dim, first, part * (1 - weight))
            part = spread.index_copy_(dim, first + 1, part * weight)
        results[chunk] = part.mul_(factor)
    return dx


def upsample_renoise_fwd(
    x: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    offset: int,
    alpha: float,
    noise_factor: float,
    mean_factor: float,
) -> Tensor:
    """``nearest2(alpha x + mean_factor mean4(z)) + noise_factor z``, z given or drawn."""
    out = x.new_empty(*x.shape[:3], 2 * x.shape[3], 2 * x.shape[4])
    planes, results = x.flatten(0, 2), out.flatten(0, 2)
    given = None if noise is None else noise.flatten(0, 2)
    for chunk in plane_chunks(out):
        base = planes[chunk].to(sum_dtype(x)) * alpha
        result = working_copy(results[chunk], base.dtype)
        if given is None:
            assert seed is not None
            counter = offset + chunk.start * base[0].numel()
            _add_drawn(result, base, seed, counter, noise_factor, mean_factor)
        else:
            z = given[chunk].to(base.dtype)
            if mean_factor:
                base += sum4(z, factor=mean_factor / 4)
            pairs = repeat_columns(base)
            torch.add(pairs, in_pairs(z), alpha=noise_factor, out=in_pairs(result))
        put(results[chunk], result)
    return out


def upsample_renoise_bwd(
    dout: Tensor,
    needs_dx: bool,
    noise_dtype: torch.dtype | None,
    alpha: float,
    noise_factor: float,
    mean_factor: float,
) -> tuple[Tensor, Tensor]:
    """``dx = alpha sum4(dout)`` and dz; one that is not needed has no elements."""
    low = (*dout.shape[:3], dout.shape[3] // 2, dout.shape[4] // 2)
    dx = dout.new_empty(low if needs_dx else 0)
    dnoise = dout.new_empty(0 if noise_dtype is None else dout.shape, dtype=noise_dtype)
    planes = dout.flatten(0, 2)
    for chunk in plane_chunks(dout):
        part = planes[chunk].to(sum_dtype(dout))
        if needs_dx:
            sum4(part, out=dx.flatten(0, 2)[chunk], factor=alpha)
        if noise_dtype is None:
            continue
        target = dnoise.flatten(0, 2)[chunk]
        result = working_copy(target, part.dtype)
        torch.mul(part, noise_factor, out=result)
        if mean_factor:
            in_pairs(result).add_(repeat_columns(sum4(part, factor=mean_factor / 4)))
        put(target, result)
    return dx, dnoise


def block_noise(
    seed: Tensor,
    offset: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    noise_factor: float,
    mean_factor: float,
) -> Tensor:
    out = seed.new_empty(shape, dtype=dtype)
    results = out.flatten(0, 2)
    for chunk in plane_chunks(out):
        base = results.new_zeros(1, dtype=sum_dtype(out))
        result = working_copy(results[chunk], base.dtype)
        counter = offset + chunk.start * (shape[3] // 2) * (shape[4] // 2)
        _add_drawn(result, base, seed, counter, noise_factor, mean_factor)
        put(results[chunk], result)
    return out


def _add_drawn(
    out: Tensor, base: Tensor, seed: Tensor, counter: int, noise_factor: float, mean_factor: float
) -> None:
    """Fills ``out`` [N, H, W] with ``nearest2(base)`` plus the noise of its blocks, z drawn."""
    n_planes, height, width = out.shape
    shape = (n_planes, height // 2, width // 2)
    z = [x.view(shape).to(base.dtype) for x in normals(int(seed), counter, out.numel() // 4)]
    if mean_factor:
        base = base + ((z[0] + z[2]) + (z[1] + z[3])).mul_(mean_factor / 4)
    for i, x in enumerate(z):  # row by row
        pixels = out[:, i // 2 :: 2, i % 2 :: 2]
        torch.add(base, x, alpha=noise_factor, out=pixels)


def sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def plane_chunks(x: Tensor) -> Iterator[slice]:
    """Slices of the planes of ``x`` [B, C, T, H, W], about `CHUNK` pixels each; none if empty."""
    if not x.numel():
        return
    n_planes = x.shape[:3].numel()
    step = max(1, CHUNK // x.shape[3:].numel())
    for start in range(0, n_planes, step):
        yield slice(start, min(start + step, n_planes))


def working_copy(result: Tensor, dtype: torch.dtype) -> Tensor:
    """Buffer of ``dtype`` for `put` to round: ``result`` itself if it has that dtype."""
    return result if result.dtype == dtype else torch.empty_like(result, dtype=dtype)


def put(result: Tensor, calculated: Tensor) -> None:
    if calculated.dtype != result.dtype:
        result.copy_(calculated)


def in_pairs(x: Tensor) -> Tensor:
    """[N, H, W] as [N, H/2, 2, W]."""
    return x.unflatten(1, (-1, 2))


def sum4(x: Tensor, *, out: Tensor | None = None, factor: float = 1.0) -> Tensor:
    """``factor`` times the sums over 2 x 2 blocks, [N, H, W] to [N, H/2, W/2]."""
    pairs = in_pairs(x)
    rows = pairs[:, :, 0] + pairs[:, :, 1]
    total = x.new_empty(rows[..., ::2].shape) if out is None else working_copy(out, x.dtype)
    torch.add(rows[..., ::2], rows[..., 1::2], out=total).mul_(factor)
    if out is not None:
        put(out, total)
    return total


def repeat_columns(x: Tensor) -> Tensor:
    """[N, h, w] to [N, h, 1, 2w], for both rows of a pair."""
    out = x.new_empty(*x.shape[:2], 1, 2 * x.shape[2])
    out[..., ::2] = out[..., 1::2] = x.unsqueeze(2)
    return out


def _sources(n_in: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Per output along a dim of [N, H, W]: the first of the two inputs it reads, and the weight of
    the second. Its centre lies at ``(i + 1/2) n_in / n_out - 1/2``, at least 2 inputs from the next
    """
    n_out = n_in // 2
    position = (2 * torch.arange(n_out) + 1) * n_in - n_out  # in units of 1 / (2 n_out)
    first = position // (2 * n_out)
    weight = (position - first * (2 * n_out)).to(dtype) / (2 * n_out)
    return first, weight[:, None] if dim == 1 else weight
