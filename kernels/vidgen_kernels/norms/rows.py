"""Rows of tokens [B, T, D] inside kernels: loads, stores, the vectors that all rows share."""

import triton
import triton.language as tl


@triton.jit
def load_rows(ptr, stride, batch, row, cols, mask, ACC: tl.constexpr):
    """Rows [ROWS, BLOCK_D] of a tensor of strides (batch, token), 0 outside ``mask``."""
    offsets = batch * stride[0] + row.to(tl.int64) * stride[1] + cols
    return tl.load(ptr + offsets, mask=mask, other=0.0).to(ACC)


@triton.jit
def store_rows(ptr, x, batch, row, cols, mask, n_tokens, D: tl.constexpr):
    """Rows of a contiguous tensor."""
    offsets = (batch * n_tokens + row) * D + cols
    tl.store(ptr + offsets, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_columns(ptr, cols, is_col, default, ACC: tl.constexpr):
    """A vector [1, BLOCK_D] that all rows share."""
    if ptr is None:
        vector = tl.full([1, 1], default, ACC)
    else:
        vector = tl.load(ptr + cols, mask=is_col, other=0.0).to(ACC)
    return vector
