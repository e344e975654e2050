"""Tiles, addresses and block sums of the kernels on 2 x 2 blocks of [B, C, T, H, W].

A *plane* is one image: [H, W] at the high resolution, [H // 2, W // 2] at the low one. A program
owns BLOCK consecutive low-resolution pixels of one plane, in row-major order, and the 2 x 2 blocks
of high-resolution pixels that they stand for. These form the tile [2, 2 BLOCK]: row 0 holds pixels
of even image rows, row 1 the pixels right below them. So loads and stores are consecutive in
memory; sums over blocks and repeated values are formed in registers.

Used by `pyramid.py` and `training_pair.py`.
"""

import math
from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import accumulator_dtype, architecture
from .configs import lookup_pixel_blocks

# Compiled once for all sizes. VECTOR, which divides widths and strides, permits wide loads.
SIZES = ("n_channels", "n_frames", "height", "width_vectors")


@triton.jit
def tile(shape, BLOCK: tl.constexpr):
    """The program's plane, its low-resolution pixels [BLOCK] and its columns of the tile [2 BLOCK].

    ``shape``: channels, frames, height and width of the high resolution. Planes are counted over
    B, C and T. High-resolution pixels are counted over the even rows alone.
    """
    n_tiles = tl.cdiv((shape[2] + 1) // 2 * shape[3], 2 * BLOCK)
    start = tl.program_id(0) % n_tiles * BLOCK
    low = start + tl.arange(0, BLOCK)
    high = 2 * start + tl.arange(0, 2 * BLOCK)
    return tl.program_id(0) // n_tiles, low, high


@triton.jit
def plane_offset(plane, shape, stride):
    """Offset of the first pixel of a plane."""
    frame = (plane % shape[1]).to(tl.int64)
    channel = (plane // shape[1] % shape[0]).to(tl.int64)
    batch = (plane // shape[1] // shape[0]).to(tl.int64)
    return batch * stride[0] + channel * stride[1] + frame * stride[2]


@triton.jit
def rows(pixel, shape):
    """The rows [2, 2 BLOCK] of a tile; rows >= height are outside the plane."""
    return 2 * (pixel // shape[3])[None, :] + tl.arange(0, 2)[:, None]


@triton.jit
def load_low(ptr, stride, plane, pixel, shape, VECTOR: tl.constexpr, ACC: tl.constexpr):
    """Pixels [BLOCK] of a plane at the lower resolution."""
    height, width = shape[2] // 2, shape[3] // 2
    row = (pixel // width).to(tl.int64) * stride[3] + plane_offset(plane, shape, stride)
    half: tl.constexpr = VECTOR // 2 if VECTOR > 1 else 1  # pyright: ignore
    ptrs = ptr + tl.multiple_of(row, half) + (pixel % width).to(tl.int64) * stride[4]
    return tl.load(ptrs, mask=pixel < height * width, other=0.0).to(ACC)


@triton.jit
def load_high(ptr, stride, plane, pixel, shape, VECTOR: tl.constexpr, ACC: tl.constexpr):
    """The tile [2, 2 BLOCK] of a plane at the higher resolution."""
    row = rows(pixel, shape)
    offset = plane_offset(plane, shape, stride) + row.to(tl.int64) * stride[3]
    column = (pixel % shape[3]).to(tl.int64)
    ptrs = ptr + tl.multiple_of(offset, (VECTOR, VECTOR)) + (column * stride[4])[None, :]
    return tl.load(ptrs, mask=row < shape[2], other=0.0).to(ACC)


@triton.jit
def store_low(ptr, x, plane, pixel, shape):
    """Stores the pixels [BLOCK] that `load_low` reads, to a contiguous tensor."""
    n_pixels = (shape[2] // 2) * (shape[3] // 2)
    ptrs = ptr + plane.to(tl.int64) * n_pixels + pixel
    tl.store(ptrs, x.to(ptr.dtype.element_ty), mask=pixel < n_pixels)


@triton.jit
def store_high(ptr, x, plane, pixel, shape):
    """Stores the tile [2, 2 BLOCK] that `load_high` reads, to a contiguous tensor."""
    row = rows(pixel, shape)
    offset = plane.to(tl.int64) * (shape[2] * shape[3]) + row * shape[3]
    ptrs = ptr + offset + (pixel % shape[3])[None, :]
    tl.store(ptrs, x.to(ptr.dtype.element_ty), mask=row < shape[2])


@triton.jit
def sum4(x):
    """Sums over blocks: [2, 2 BLOCK] to [BLOCK]."""
    left, right = tl.split(tl.reshape(tl.sum(x, axis=0), [x.shape[1] // 2, 2]))
    return left + right


@triton.jit
def nearest2(x):
    """Repeats each value twice: [BLOCK] to [1, 2 BLOCK], which broadcasts to both rows."""
    return tl.interleave(x, x)[None, :]


def tiling(
    result: Tensor, high: Sequence[Tensor], low: Sequence[Tensor] = ()
) -> tuple[tuple[int], tuple[int, int, int, int], dict[str, Any]]:
    """Grid, sizes and constants of a kernel on 2 x 2 blocks.

    Args:
        result: its dtype decides the accumulator dtype and the launch configuration.
        high, low: the tensors accessed at the two resolutions; at least one in ``high``.
    """
    _, n_channels, n_frames, height, width = high[0].shape
    vector = math.gcd(8, width)  # 8: 16 bytes of a 16-bit dtype
    for factor, tensors in ((1, high), (2, low)):
        for x in tensors:
            vector = math.gcd(
                vector,
                *(factor * s for s, n in zip(x.stride()[:4], x.shape, strict=False) if n > 1),
            )
    config = lookup_pixel_blocks(result.dtype, architecture(result))
    n_planes = math.prod(high[0].shape[:3])
    n_tiles = -(-((height + 1) // 2 * width) // (2 * config.block))
    constants = {"VECTOR": vector, "ACC": accumulator_dtype(result.dtype), **config.kwargs()}
    return (n_planes * n_tiles,), (n_channels, n_frames, height, width // vector), constants
