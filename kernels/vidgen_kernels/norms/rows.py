"""Rows of tokens [B, T, D]: how the kernels of this family load and store them, and are launched.

A program owns consecutive rows of one batch row and goes through them ROWS at a time. Kernels take
an input as (pointer, batch stride, token stride), which `rows_of` makes, or as None; a result,
which is contiguous, as its pointer. What is loaded or stored is said by

    at = batch row, rows [ROWS, 1], columns [1, BLOCK_D], mask [ROWS, BLOCK_D]
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.configs import RowConfig
from ..common.launch import accumulator_dtype

SIZES = ("n_batch", "n_tokens")  # a kernel is compiled once for all values of these


@triton.jit
def rows_of_program(pid, n_tokens, ROWS: tl.constexpr, TILES: tl.constexpr):
    """Batch row, first row of it, and end."""
    n_chunks = tl.cdiv(n_tokens, ROWS * TILES)
    first = (pid % n_chunks) * ROWS * TILES
    return (pid // n_chunks).to(tl.int64), first, tl.minimum(first + ROWS * TILES, n_tokens)


@triton.jit
def load_rows(x_rows, at, ACC: tl.constexpr):
    """[ROWS, BLOCK_D] in ``ACC``, 0 outside of the mask; all 0 if there is no tensor."""
    batch, row, cols, mask = at
    if x_rows is None:
        x = tl.zeros(mask.shape, ACC)
    else:
        ptr, stride_batch, stride_token = x_rows
        offsets = batch * stride_batch + row.to(tl.int64) * stride_token + cols
        x = tl.load(ptr + offsets, mask=mask, other=0.0).to(ACC)
    return x


@triton.jit
def store_rows(ptr, x, at, n_tokens, D: tl.constexpr):
    batch, row, cols, mask = at
    offsets = (batch * n_tokens + row) * D + cols
    tl.store(ptr + offsets, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_columns(ptr, cols, is_col, default, ACC: tl.constexpr):
    """A vector [1, BLOCK_D] that all rows share, or ``default`` if there is none."""
    if ptr is None:
        vector = tl.full([1, 1], default, ACC)
    else:
        vector = tl.load(ptr + cols, mask=is_col, other=0.0).to(ACC)
    return vector


@triton.jit
def store_stats(ptr, mean, rstd, batch, row, end, n_batch, n_tokens):
    """Mean and rstd [ROWS, 1] to [2, B, T]."""
    ptrs = ptr + batch * n_tokens + row
    tl.store(ptrs, mean, mask=row < end)
    tl.store(ptrs + n_batch * n_tokens, rstd, mask=row < end)


@triton.jit
def load_stats(ptr, batch, row, end, n_batch, n_tokens):
    """What `store_stats` stored."""
    ptrs = ptr + batch * n_tokens + row
    mean = tl.load(ptrs, mask=row < end, other=0.0)
    rstd = tl.load(ptrs + n_batch * n_tokens, mask=row < end, other=0.0)
    return mean, rstd


Rows = tuple[Tensor, int, int]


def rows_of(x: Tensor | None) -> Rows | None:
    """``x`` [B or 1, T or 1, D] as a kernel takes it; a stride of 0 repeats a single row."""
    if x is None:
        return None
    n_batch, n_tokens, _ = x.shape
    stride_batch, stride_token, _ = x.stride()
    return x, stride_batch if n_batch > 1 else 0, stride_token if n_tokens > 1 else 0


def count_programs(n_tokens: int, config: RowConfig) -> int:
    """How many programs ``n_tokens`` rows of a batch row take."""
    return -(-n_tokens // (config.rows * config.tiles))


def constants(n_cols: int, dtype: torch.dtype, config: RowConfig) -> dict[str, Any]:
    """Those of every kernel here; it accumulates as ``dtype`` asks."""
    return {
        "D": n_cols,
        "BLOCK_D": triton.next_power_of_2(n_cols),
        "ACC": accumulator_dtype(dtype),
        **config.kwargs(),
    }
