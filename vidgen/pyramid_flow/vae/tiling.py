"""Encoding and decoding in overlapping square tiles, which saves memory. `vae` calls it.

Norms, attention and padding see one tile at a time, so the result differs a little from that of
whole frames. Where tiles overlap they are blended. All but the last ``blend`` rows and columns of
a tile's result are kept. Its first ``blend`` rows are mixed with the last rows of the tile above,
then its first columns with the last columns of the tile to the left, both already blended::

    result[y] = (1 - y / blend) * neighbour[end - blend + y] + (y / blend) * tile[y]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Tiling(NamedTuple):
    """Lengths along rows and columns: the first two of the input, the others of the output."""

    size: int
    stride: int
    blend: int
    keep: int


def encode_tiling(tile: int, factor: int) -> Tiling:
    """Tiles of ``tile`` pixels a side, a quarter of which overlaps with the next tile.

    Raises:
        ValueError: a tile that is no multiple of ``4 * factor`` pixels.
    """
    latents = _latents(tile, factor)
    return Tiling(size=tile, stride=tile * 3 // 4, blend=latents // 4, keep=latents * 3 // 4)


def decode_tiling(tile: int, factor: int) -> Tiling:
    """The same tiles, from latents to pixels. Errors: as for `encode_tiling`."""
    latents = _latents(tile, factor)
    return Tiling(size=latents, stride=latents * 3 // 4, blend=tile // 4, keep=tile * 3 // 4)


def _latents(tile: int, factor: int) -> int:
    if tile < 4 * factor or tile % (4 * factor):
        raise ValueError(f"tile: expected a multiple of {4 * factor} pixels, got {tile}")
    return tile // factor


def run_tiled(
    x: Tensor,  # [B, C, T, H, W]
    tiling: Tiling | None,
    code: Callable[[Tensor, tuple[int, int]], Tensor],
) -> Tensor:
    """Applies ``code(tile, (row, column))`` to every tile of ``x`` and puts the results together.

    If ``x`` fits into one tile, that is ``x`` itself. Besides the result, only one tile and the
    edges of its neighbours are in memory.
    """
    height, width = x.shape[-2:]
    if tiling is None or max(height, width) <= tiling.size:
        return code(x, (0, 0))
    size, stride, blend, keep = tiling
    out = None
    above: dict[int, Tensor] = {}  # last rows of the tiles of the row before
    for i, top in enumerate(range(0, height, stride)):
        left = None  # last columns of the tile before
        for j, start in enumerate(range(0, width, stride)):
            y = code(x[..., top : top + size, start : start + size], (i, j))
            if j in above:
                _blend(above[j], y, dim=-2)
            if left is not None:
                _blend(left, y, dim=-1)
            if out is None:
                rows, columns = (-(-n * keep // stride) for n in (height, width))
                out = y.new_empty(*y.shape[:-2], rows, columns)
            kept = y[..., :keep, :keep]
            rows, columns = kept.shape[-2:]
            out[..., i * keep : i * keep + rows, j * keep : j * keep + columns] = kept
            above[j], left = y[..., -blend:, :].clone(), y[..., -blend:]
    assert out is not None  # there is at least one tile
    return out


def _blend(before: Tensor, tile: Tensor, dim: int) -> None:
    """Mixes a tile's first rows (dim -2) or columns (-1), in place, with the last of ``before``."""
    n = min(before.shape[dim], tile.shape[dim])
    before = before.narrow(dim, before.shape[dim] - n, n)
    first = tile.narrow(dim, 0, n)
    share = torch.arange(n, dtype=torch.float64, device=tile.device) / n
    share = share if dim == -1 else share[:, None]
    dtype = torch.promote_types(tile.dtype, torch.float32)
    first.copy_(before * (1 - share).to(dtype) + first * share.to(dtype))
