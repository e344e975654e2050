"""Tiles [rows, HEAD_DIM] of a head, as tuples of blocks of columns.

All blocks are ``BLOCK_D`` wide, except the last, which is ``LAST_D`` wide and the only one that may
be padded. Triton's products need powers of two: 96 columns are blocks of 64 and 32, which takes
three quarters of the work of 128. Used by the kernels of `interval_attention.py`.
"""

import triton
import triton.language as tl

MIN_BLOCK = 16  # the least number of columns that tensor cores take


def block_widths(head_dim: int, block_d: int) -> dict[str, int]:
    """The constants ``BLOCK_D`` and ``LAST_D`` of the kernels."""
    n_last = (head_dim - 1) % block_d + 1
    return {"BLOCK_D": block_d, "LAST_D": max(MIN_BLOCK, 1 << (n_last - 1).bit_length())}


@triton.jit
def column_blocks(HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, LAST_D: tl.constexpr):
    """The columns of every block: a tuple of [BLOCK_D], ..., [LAST_D]."""
    N_BLOCKS: tl.constexpr = (HEAD_DIM + BLOCK_D - 1) // BLOCK_D
    blocks = ()
    for i in tl.static_range(N_BLOCKS):  # pyright: ignore
        blocks += (i * BLOCK_D + tl.arange(0, BLOCK_D if i + 1 < N_BLOCKS else LAST_D),)
    return blocks


@triton.jit
def head_ptr(ptr, head, n_heads, stride):
    """Pointer to the first token of a head; ``head`` counts over all batch rows."""
    batch = (head // n_heads).to(tl.int64)
    return ptr + batch * stride[0] + (head % n_heads).to(tl.int64) * stride[1]


@triton.jit
def tile_ptrs(ptr, head, n_heads, stride, offs_t, offs_d):
    """Pointers to tokens ``offs_t`` of a head; offsets are 64-bit."""
    rows = head_ptr(ptr, head, n_heads, stride) + offs_t.to(tl.int64)[:, None] * stride[2]
    ptrs = ()
    for i in tl.static_range(len(offs_d)):  # pyright: ignore
        ptrs += (rows + offs_d[i][None, :],)
    return ptrs


@triton.jit
def load_tile(ptrs, offset, offs_t, n_tokens, offs_d, HEAD_DIM: tl.constexpr, MASK: tl.constexpr):
    """The tile at ``ptrs + offset``, whose tokens are ``offs_t``.

    Columns past ``HEAD_DIM`` are 0. So are tokens past ``n_tokens``, if ``MASK``.
    """
    tile = ()
    for i in tl.static_range(len(offs_d)):  # pyright: ignore
        is_col = (offs_d[i] < HEAD_DIM)[None, :]
        if MASK:
            mask = (offs_t < n_tokens)[:, None] & is_col
            block = tl.load(ptrs[i] + offset, mask=mask, other=0.0)
        elif i * offs_d[0].shape[0] + offs_d[i].shape[0] <= HEAD_DIM:
            block = tl.load(ptrs[i] + offset)
        else:
            block = tl.load(ptrs[i] + offset, mask=is_col, other=0.0)
        tile += (block,)
    return tile


@triton.jit
def store_tile(ptrs, tile, scale, offs_t, n_tokens, offs_d, HEAD_DIM: tl.constexpr):
    """Stores ``scale`` times the tile; ``scale`` is a number or has one for each row, [rows, 1]."""
    for i in tl.static_range(len(offs_d)):  # pyright: ignore
        mask = (offs_t < n_tokens)[:, None] & (offs_d[i] < HEAD_DIM)[None, :]
        tl.store(ptrs[i], (tile[i] * scale).to(ptrs[i].dtype.element_ty), mask=mask)


@triton.jit
def zero_tile(ROWS: tl.constexpr, offs_d, ACC: tl.constexpr):
    """Zeros [ROWS, HEAD_DIM]."""
    tile = ()
    for i in tl.static_range(len(offs_d)):  # pyright: ignore
        tile += (tl.zeros([ROWS, offs_d[i].shape[0]], ACC),)
    return tile


@triton.jit
def scores(a, b, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """The product a b^T, [rows of a, rows of b]."""
    s = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION, out_dtype=ACC)  # pyright: ignore
    for i in tl.static_range(1, len(a)):  # pyright: ignore
        s = tl.dot(a[i], tl.trans(b[i]), s, input_precision=PRECISION, out_dtype=ACC)  # pyright: ignore
    return s


@triton.jit
def add_product(acc, p, b, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """acc + p b; p [rows of acc, rows of b] is rounded to the dtype of b first."""
    total = ()
    for i in tl.static_range(len(acc)):  # pyright: ignore
        p_ = p.to(b[i].dtype)
        block = tl.dot(p_, b[i], acc[i], input_precision=PRECISION, out_dtype=ACC)  # pyright: ignore
        total += (block,)
    return total


@triton.jit
def scale_rows(tile, factor):
    """The tile times ``factor`` [rows]."""
    scaled = ()
    for i in tl.static_range(len(tile)):  # pyright: ignore
        scaled += (tile[i] * factor[:, None],)
    return scaled


@triton.jit
def sum_of_products(a, b, ACC: tl.constexpr):
    """The dot product a_i . b_i of each row i, [rows]."""
    total = tl.sum(a[0].to(ACC) * b[0].to(ACC), 1)
    for i in tl.static_range(1, len(a)):  # pyright: ignore
        total += tl.sum(a[i].to(ACC) * b[i].to(ACC), 1)
    return total
