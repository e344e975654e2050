"""Tiles [rows, HEAD_DIM] of an attention head, held as tuples of column blocks.

Used by the kernels of `interval_attention.py`. Every block is ``BLOCK_D`` columns wide except the
last, which is ``LAST_D`` wide and the only one that may be padded. Triton's tiles are powers of
two: a single block for 96 columns would be padded to 128, while blocks of 64 and 32 take three
quarters of that work.

In shape comments D stands for HEAD_DIM, and a shape with D for the whole tuple.
"""

import triton
import triton.language as tl

MIN_BLOCK = 16  # the fewest columns that tensor cores take


def block_widths(head_dim: int, block_d: int) -> dict[str, int]:
    """``BLOCK_D`` and ``LAST_D``, as keyword arguments of a kernel."""
    n_last = (head_dim - 1) % block_d + 1
    return {"BLOCK_D": block_d, "LAST_D": max(MIN_BLOCK, 1 << (n_last - 1).bit_length())}


@triton.jit
def column_blocks(HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, LAST_D: tl.constexpr):
    """The columns of each block, [BLOCK_D] or, for the last, [LAST_D]; elsewhere ``offs_d``."""
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
    """Pointers [rows, D] to the tokens ``offs_t`` [rows] of a head; offsets are 64-bit."""
    # [rows, 1]
    rows = head_ptr(ptr, head, n_heads, stride) + offs_t.to(tl.int64)[:, None] * stride[2]
    ptrs = ()
    for i in tl.static_range(len(offs_d)):  # pyright: ignore
        ptrs += (rows + offs_d[i][None, :],)
    return ptrs


@triton.jit
def load_tile(ptrs, offset, offs_t, n_tokens, offs_d, HEAD_DIM: tl.constexpr, MASK: tl.constexpr):
    """The tile [rows, D] that lies ``offset`` elements after ``ptrs``.

    Columns past ``HEAD_DIM`` are 0. With ``MASK`` so are rows whose token ``offs_t`` [rows] is past
    ``n_tokens``; without it all tokens must exist.
    """
    tile = ()
    for i in tl.static_range(len(offs_d)):  # pyright: ignore
        # [1, columns of the block]
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
    """Stores the tile [rows, D] times ``scale``, which is a number or [rows, 1]."""
    for i in tl.static_range(len(offs_d)):  # pyright: ignore
        mask = (offs_t < n_tokens)[:, None] & (offs_d[i] < HEAD_DIM)[None, :]
        tl.store(ptrs[i], (tile[i] * scale).to(ptrs[i].dtype.element_ty), mask=mask)


@triton.jit
def zero_tile(ROWS: tl.constexpr, offs_d, ACC: tl.constexpr):
    """Zeros [ROWS, D] in the dtype ``ACC``."""
    tile = ()
    for i in tl.static_range(len(offs_d)):  # pyright: ignore
        tile += (tl.zeros([ROWS, offs_d[i].shape[0]], ACC),)
    return tile


@triton.jit
def scores(a, b, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T [rows of a, rows of b], for tiles a and b [rows, D]."""
    # [rows of a, rows of b]
    s = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION, out_dtype=ACC)  # pyright: ignore
    for i in tl.static_range(1, len(a)):  # pyright: ignore
        s = tl.dot(a[i], tl.trans(b[i]), s, input_precision=PRECISION, out_dtype=ACC)  # pyright: ignore
    return s


@triton.jit
def add_product(acc, p, b, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """acc + p b, for acc [rows of acc, D], p [rows of acc, rows of b] and b [rows of b, D].

    p is rounded to the dtype of b before the product.
    """
    total = ()
    for i in tl.static_range(len(acc)):  # pyright: ignore
        p_ = p.to(b[i].dtype)
        # [rows of acc, columns of the block]
        block = tl.dot(p_, b[i], acc[i], input_precision=PRECISION, out_dtype=ACC)  # pyright: ignore
        total += (block,)
    return total


@triton.jit
def scale_rows(tile, factor):
    """The tile [rows, D] with each row multiplied by its ``factor`` [rows]."""
    scaled = ()
    for i in tl.static_range(len(tile)):  # pyright: ignore
        scaled += (tile[i] * factor[:, None],)
    return scaled


@triton.jit
def sum_of_products(a, b, ACC: tl.constexpr):
    """The dot product a_i . b_i of each row i, [rows]."""
    # [rows]
    total = tl.sum(a[0].to(ACC) * b[0].to(ACC), 1)
    for i in tl.static_range(1, len(a)):  # pyright: ignore
        total += tl.sum(a[i].to(ACC) * b[i].to(ACC), 1)
    return total
