"""Normalised, rotated queries and keys, head by head, in one pass over the projection.

    xhat = (x - mean(x)) * rsqrt(var(x) + eps)  "layer"    over the D elements of a head
    xhat = x * rsqrt(mean(x^2) + eps)           "rms"
    n = xhat * weight + bias                               a weight or bias of None is left out
    (a, b) -> (a cos - b sin, a sin + b cos)               columns 2i and 2i + 1 of n, video rows
    angle of pair i of an axis of width d: position * theta^(-2i / d)

    dn = the rotation back;  dweight = sum dn * xhat;  dbias = sum dn;  dxhat = dn * weight
    dx = rstd * (dxhat - mean(dxhat) - xhat * mean(dxhat * xhat))    no mean(dxhat) for "rms"

Shapes: projections [B, T, 3 * H * D], q | k | v, or three of [B, T, H * D]; results [B, H, T, D];
positions [B or 1, T_video, A]. v is only copied.

There are two *parts*: text, which comes first and is not rotated, and video. Parts are two streams
with their own weights (joint attention), or two sections of one sequence; both are written to one
result. A program owns ROWS tokens of one part and up to TILES heads. It computes the angles once
from the positions, in fp64 turns and without tables; all its heads share the cosines. The backward
recomputes the statistics from the projection, so that nothing else is saved. Gradients of
weights and biases are summed per program, then by PyTorch: no atomics.

RoPE 2104.09864 over the axes of a video; QK norm 2302.05442. Used by Pyramid Flow 2410.05954 (rms,
joint), CogVideoX 2408.06072 (layer, one sequence), NOVA 2412.14169 (rotation alone).
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.configs import RowConfig
from ..common.jit import cos_sin, normalize, normalize_backward, scalar
from ..common.launch import accumulator_dtype, architecture
from .configs import lookup
from .portable import empty_results, gradients_like, parts_of, split_results

# Compiled once for all sizes: every stage and unit of a video has its own token count.
SIZES = ("n_batch", "n_heads", "n_text", "n_video")


@triton.jit
def _place(pid, n_heads, n_tokens, ROWS: tl.constexpr, TILES: tl.constexpr):
    """Batch row, tokens [ROWS] and first head of a program; heads of a token are neighbours."""
    n_groups = tl.cdiv(n_heads, TILES)
    n_tiles = tl.cdiv(n_tokens, ROWS)
    tile = pid // n_groups
    offs_t = (tile % n_tiles) * ROWS + tl.arange(0, ROWS)
    return tile // n_tiles, offs_t, (pid % n_groups) * TILES


@triton.jit
def _n_programs(n_batch, n_heads, n_tokens, ROWS: tl.constexpr, TILES: tl.constexpr):
    return n_batch * tl.cdiv(n_tokens, ROWS) * tl.cdiv(n_heads, TILES)


@triton.jit
def _tile_ptrs(ptr, strides, batch, head, offs_t, offs_d):
    """Pointers [ROWS, BLOCK_D] to tokens of a head; strides over (batch, head, token)."""
    row = batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
    return ptr + row + offs_t.to(tl.int64)[:, None] * strides[2] + offs_d[None, :]


@triton.jit
def _load_tile(ptr, strides, batch, head, offs_t, offs_d, mask, ACC: tl.constexpr):
    ptrs = _tile_ptrs(ptr, strides, batch, head, offs_t, offs_d)
    return tl.load(ptrs, mask=mask, other=0.0).to(ACC)


@triton.jit
def _store_tile(ptr, strides, batch, head, offs_t, offs_d, mask, x):
    ptrs = _tile_ptrs(ptr, strides, batch, head, offs_t, offs_d)
    tl.store(ptrs, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_vector(ptr, is_col, offs_d, ACC: tl.constexpr):
    """A weight or bias as a row [1, BLOCK_D]; None stays None."""
    vector = None
    if ptr is not None:
        vector = tl.load(ptr + offs_d[None, :], mask=is_col, other=0.0).to(ACC)
    return vector


@triton.jit
def _angles(
    positions_ptr, strides, batch, offs_t, n_tokens, log2_theta,
    HEAD_DIM: tl.constexpr, AXES: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Cosines and sines [ROWS, BLOCK_D / 2]; the angle is 0 for columns past the axes."""
    pair = tl.arange(0, BLOCK_D // 2)
    row = positions_ptr + batch.to(tl.int64) * strides[0] + offs_t.to(tl.int64) * strides[1]
    power = tl.zeros([BLOCK_D // 2], tl.float64)
    if 2 * len(AXES) == HEAD_DIM:  # one axis per pair: position is angle
        mask = (offs_t < n_tokens)[:, None] & (pair < len(AXES))[None, :]
        ptrs = row[:, None] + pair[None, :] * strides[2]
        position = tl.load(ptrs, mask=mask, other=0.0).to(tl.float64)
    else:
        position = tl.zeros([offs_t.shape[0], BLOCK_D // 2], tl.float64)
        first = 0
        for i in tl.static_range(len(AXES)):  # pyright: ignore
            in_axis = (pair >= first) & (pair < first + AXES[i] // 2)
            power = tl.where(in_axis, (pair - first).to(tl.float64) * (-2 / AXES[i]), power)
            x = tl.load(row + i * strides[2], mask=offs_t < n_tokens, other=0.0).to(tl.float64)
            position = tl.where(in_axis[None, :], x[:, None], position)
            first += AXES[i] // 2
    # theta^power / (2 pi) turns per unit
    frequency = tl.exp2(power * scalar(log2_theta, tl.float64)) * 0.15915494309189535
    return cos_sin(position * frequency[None, :], ACC)


@triton.jit
def _rotate(x, cosine, sine):
    """(a, b) -> (a cos - b sin, a sin + b cos) for the columns 2i and 2i + 1 of x."""
    # [ROWS, BLOCK_D / 2]
    a, b = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    return tl.reshape(tl.join(a * cosine - b * sine, a * sine + b * cosine), x.shape)


@triton.jit
def _norm_rotate(
    x, weight, bias, cosine, sine, is_col, n_cols, eps, NORM: tl.constexpr, ROTATE: tl.constexpr
):
    if NORM is not None:
        x, _ = normalize(x, is_col, n_cols, eps, NORM == "rms")  # pyright: ignore
        if weight is not None:
            x = x * weight
        if bias is not None:
            x = x + bias
    return _rotate(x, cosine, sine) if ROTATE else x


@triton.jit
def _norm_rotate_backward(
    dy, x, weight, dweight, dbias, cosine, sine, is_col, n_cols, eps,
    NORM: tl.constexpr, ROTATE: tl.constexpr, HAS_DWEIGHT: tl.constexpr, HAS_DBIAS: tl.constexpr,
):  # fmt: skip
    """dx of a tile; adds to ``dweight`` and ``dbias``, [ROWS, BLOCK_D], summed over rows later."""
    dn = _rotate(dy, cosine, -sine) if ROTATE else dy
    if NORM is not None:
        xhat, rstd = normalize(x, is_col, n_cols, eps, NORM == "rms")  # pyright: ignore
        if HAS_DWEIGHT:
            dweight += dn * xhat
        if HAS_DBIAS:
            dbias += dn
        if weight is not None:
            dn = dn * weight
        dn = normalize_backward(dn, xhat, rstd, is_col, n_cols, NORM == "rms")
    return dn, dweight, dbias


@triton.jit
def _fwd_part(
    pid, x_ptrs, x_strides, vector_ptrs, y_ptrs, y_strides, positions_ptr, positions_strides,
    n_heads, n_tokens, eps, log2_theta,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, AXES: tl.constexpr, NORM: tl.constexpr,
    ROTATE: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    batch, offs_t, first_head = _place(pid, n_heads, n_tokens, ROWS, TILES)  # pyright: ignore
    offs_d = tl.arange(0, BLOCK_D)
    is_col = (offs_d < HEAD_DIM)[None, :]
    mask = (offs_t < n_tokens)[:, None] & is_col
    cosine, sine = None, None
    if ROTATE:
        cosine, sine = _angles(
            positions_ptr, positions_strides, batch, offs_t, n_tokens, log2_theta,
            HEAD_DIM, AXES, BLOCK_D, ACC,
        )  # fmt: skip
    q_weight = _load_vector(vector_ptrs[0], is_col, offs_d, ACC)
    k_weight = _load_vector(vector_ptrs[1], is_col, offs_d, ACC)
    q_bias = _load_vector(vector_ptrs[2], is_col, offs_d, ACC)
    k_bias = _load_vector(vector_ptrs[3], is_col, offs_d, ACC)
    for i in range(tl.minimum(TILES, n_heads - first_head)):
        head = first_head + i
        # [ROWS, BLOCK_D]
        q = _load_tile(x_ptrs[0], x_strides[0], batch, head, offs_t, offs_d, mask, ACC)
        k = _load_tile(x_ptrs[1], x_strides[1], batch, head, offs_t, offs_d, mask, ACC)
        if len(x_ptrs) == 3:
            v = _load_tile(x_ptrs[2], x_strides[2], batch, head, offs_t, offs_d, mask, ACC)
            _store_tile(y_ptrs[2], y_strides[2], batch, head, offs_t, offs_d, mask, v)
        q = _norm_rotate(
            q, q_weight, q_bias, cosine, sine, is_col, HEAD_DIM, eps, NORM, ROTATE
        )  # fmt: skip
        _store_tile(y_ptrs[0], y_strides[0], batch, head, offs_t, offs_d, mask, q)
        k = _norm_rotate(
            k, k_weight, k_bias, cosine, sine, is_col, HEAD_DIM, eps, NORM, ROTATE
        )  # fmt: skip
        _store_tile(y_ptrs[1], y_strides[1], batch, head, offs_t, offs_d, mask, k)


@triton.jit
def _bwd_part(
    pid, dy_ptrs, dy_strides, x_ptrs, x_strides, vector_ptrs, dx_ptrs, dx_strides, partial_ptr,
    positions_ptr, positions_strides, n_heads, n_tokens, eps, log2_theta,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, AXES: tl.constexpr, NORM: tl.constexpr,
    ROTATE: tl.constexpr, HAS_DWEIGHT: tl.constexpr, HAS_DBIAS: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """``partial_ptr``: sums of this program for q_weight, k_weight, q_bias and k_bias, [4, D]."""
    batch, offs_t, first_head = _place(pid, n_heads, n_tokens, ROWS, TILES)  # pyright: ignore
    offs_d = tl.arange(0, BLOCK_D)
    is_col = (offs_d < HEAD_DIM)[None, :]
    mask = (offs_t < n_tokens)[:, None] & is_col
    cosine, sine = None, None
    if ROTATE:
        cosine, sine = _angles(
            positions_ptr, positions_strides, batch, offs_t, n_tokens, log2_theta,
            HEAD_DIM, AXES, BLOCK_D, ACC,
        )  # fmt: skip
    q_weight = _load_vector(vector_ptrs[0], is_col, offs_d, ACC)
    k_weight = _load_vector(vector_ptrs[1], is_col, offs_d, ACC)
    dq_weight = tl.zeros([ROWS, BLOCK_D], ACC)
    dk_weight = tl.zeros([ROWS, BLOCK_D], ACC)
    dq_bias = tl.zeros([ROWS, BLOCK_D], ACC)
    dk_bias = tl.zeros([ROWS, BLOCK_D], ACC)
    for i in range(tl.minimum(TILES, n_heads - first_head)):
        head = first_head + i
        # [ROWS, BLOCK_D]
        dq = _load_tile(dy_ptrs[0], dy_strides[0], batch, head, offs_t, offs_d, mask, ACC)
        dk = _load_tile(dy_ptrs[1], dy_strides[1], batch, head, offs_t, offs_d, mask, ACC)
        q, k = None, None
        if NORM is not None:
            q = _load_tile(x_ptrs[0], x_strides[0], batch, head, offs_t, offs_d, mask, ACC)
            k = _load_tile(x_ptrs[1], x_strides[1], batch, head, offs_t, offs_d, mask, ACC)
        if len(dx_ptrs) == 3:
            dv = _load_tile(dy_ptrs[2], dy_strides[2], batch, head, offs_t, offs_d, mask, ACC)
            _store_tile(dx_ptrs[2], dx_strides[2], batch, head, offs_t, offs_d, mask, dv)
        dq, dq_weight, dq_bias = _norm_rotate_backward(
            dq, q, q_weight, dq_weight, dq_bias, cosine, sine, is_col, HEAD_DIM, eps,
            NORM, ROTATE, HAS_DWEIGHT, HAS_DBIAS,
        )  # fmt: skip
        _store_tile(dx_ptrs[0], dx_strides[0], batch, head, offs_t, offs_d, mask, dq)
        dk, dk_weight, dk_bias = _norm_rotate_backward(
            dk, k, k_weight, dk_weight, dk_bias, cosine, sine, is_col, HEAD_DIM, eps,
            NORM, ROTATE, HAS_DWEIGHT, HAS_DBIAS,
        )  # fmt: skip
        _store_tile(dx_ptrs[1], dx_strides[1], batch, head, offs_t, offs_d, mask, dk)
    is_vector = offs_d < HEAD_DIM
    if HAS_DWEIGHT:
        tl.store(partial_ptr + offs_d, tl.sum(dq_weight, 0), mask=is_vector)
        tl.store(partial_ptr + HEAD_DIM + offs_d, tl.sum(dk_weight, 0), mask=is_vector)
    if HAS_DBIAS:
        tl.store(partial_ptr + 2 * HEAD_DIM + offs_d, tl.sum(dq_bias, 0), mask=is_vector)
        tl.store(partial_ptr + 3 * HEAD_DIM + offs_d, tl.sum(dk_bias, 0), mask=is_vector)


@triton.jit(do_not_specialize=SIZES)
def _qk_norm_rope_fwd_kernel(
    # per part: pointers to q, k and v (no v if it is returned as a view), their strides over
    # (batch, head, token), weights
    text_x_ptrs, text_x_strides, text_vector_ptrs, text_y_ptrs, text_y_strides,
    x_ptrs, x_strides, vector_ptrs, y_ptrs, y_strides,
    positions_ptr, positions_strides, n_batch, n_heads, n_text, n_video,
    eps: tl.float64, log2_theta: tl.float64,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, AXES: tl.constexpr, NORM: tl.constexpr,
    ROTATE: tl.constexpr, HAS_TEXT: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    n_text_programs = _n_programs(n_batch, n_heads, n_text, ROWS, TILES) if HAS_TEXT else 0
    if pid >= n_text_programs:
        _fwd_part(
            pid - n_text_programs, x_ptrs, x_strides, vector_ptrs, y_ptrs, y_strides,
            positions_ptr, positions_strides, n_heads, n_video, eps, log2_theta,
            HEAD_DIM, BLOCK_D, AXES, NORM, ROTATE, ACC, ROWS, TILES,
        )  # fmt: skip
    elif HAS_TEXT:
        _fwd_part(
            pid, text_x_ptrs, text_x_strides, text_vector_ptrs, text_y_ptrs, text_y_strides,
            positions_ptr, positions_strides, n_heads, n_text, eps, log2_theta,
            HEAD_DIM, BLOCK_D, AXES, NORM, False, ACC, ROWS, TILES,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def _qk_norm_rope_bwd_kernel(
    text_dy_ptrs, text_dy_strides, text_x_ptrs, text_x_strides, text_vector_ptrs,
    text_dx_ptrs, text_dx_strides,
    dy_ptrs, dy_strides, x_ptrs, x_strides, vector_ptrs, dx_ptrs, dx_strides, partial_ptr,
    positions_ptr, positions_strides, n_batch, n_heads, n_text, n_video,
    eps: tl.float64, log2_theta: tl.float64,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, AXES: tl.constexpr, NORM: tl.constexpr,
    ROTATE: tl.constexpr, HAS_TEXT: tl.constexpr,
    HAS_DWEIGHT: tl.constexpr, HAS_DBIAS: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if HAS_DWEIGHT or HAS_DBIAS:
        partial_ptr += pid.to(tl.int64) * 4 * HEAD_DIM
    n_text_programs = _n_programs(n_batch, n_heads, n_text, ROWS, TILES) if HAS_TEXT else 0
    if pid >= n_text_programs:
        _bwd_part(
            pid - n_text_programs, dy_ptrs, dy_strides, x_ptrs, x_strides, vector_ptrs,
            dx_ptrs, dx_strides, partial_ptr,
            positions_ptr, positions_strides, n_heads, n_video, eps, log2_theta,
            HEAD_DIM, BLOCK_D, AXES, NORM, ROTATE, HAS_DWEIGHT, HAS_DBIAS, ACC, ROWS, TILES,
        )  # fmt: skip
    elif HAS_TEXT:
        _bwd_part(
            pid, text_dy_ptrs, text_dy_strides, text_x_ptrs, text_x_strides, text_vector_ptrs,
            text_dx_ptrs, text_dx_strides, partial_ptr,
            positions_ptr, positions_strides, n_heads, n_text, eps, log2_theta,
            HEAD_DIM, BLOCK_D, AXES, NORM, False, HAS_DWEIGHT, HAS_DBIAS, ACC, ROWS, TILES,
        )  # fmt: skip


def launch_fwd(
    projections: list[Tensor], text_projections: list[Tensor],
    q_weight: Tensor | None, k_weight: Tensor | None,
    q_bias: Tensor | None, k_bias: Tensor | None,
    text_q_weight: Tensor | None, text_k_weight: Tensor | None,
    text_q_bias: Tensor | None, text_k_bias: Tensor | None,
    positions: Tensor | None, n_heads: int, text_length: int, axes: list[int] | None,
    norm: str | None, eps: float, theta: float, dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    vectors = [q_weight, k_weight, q_bias, k_bias]
    text_vectors = [text_q_weight, text_k_weight, text_q_bias, text_k_bias]
    text, video = parts_of(projections, text_projections, text_length, n_heads)
    results = empty_results(text, video, dtype)
    text_y, y = split_results(results, text)
    config, sizes, n_programs = _placement("fwd", text, video)
    if sum(n_programs):
        _qk_norm_rope_fwd_kernel[(sum(n_programs),)](
            *_pointers(text or video), tuple(text_vectors if text_projections else vectors),
            *_pointers(text_y or y),
            *_pointers(video), tuple(vectors), *_pointers(y),
            positions, _position_strides(positions), *sizes, eps, math.log2(theta),
            **_constants(config, video, axes, norm, HAS_TEXT=bool(text)),
        )  # fmt: skip
    return results


def launch_bwd(
    gradients: list[Tensor], projections: list[Tensor], text_projections: list[Tensor],
    q_weight: Tensor | None, k_weight: Tensor | None,
    q_bias: Tensor | None, k_bias: Tensor | None,
    text_q_weight: Tensor | None, text_k_weight: Tensor | None,
    text_q_bias: Tensor | None, text_k_bias: Tensor | None,
    positions: Tensor | None, n_heads: int, text_length: int, axes: list[int] | None,
    norm: str | None, eps: float, theta: float, needs_vectors: bool,
) -> list[Tensor]:  # fmt: skip
    vectors = [q_weight, k_weight, q_bias, k_bias]
    text_vectors = [text_q_weight, text_k_weight, text_q_bias, text_k_bias]
    text, video = parts_of(projections, text_projections, text_length, n_heads)
    dx, text_dx = gradients_like(projections), gradients_like(text_projections)
    text_dx_parts, dx_parts = parts_of(dx, text_dx, text_length, n_heads)
    # e.g. the expanded gradient of a sum
    rows = [g if g.stride(-1) == 1 else g.contiguous() for g in gradients]
    text_dy, dy = split_results(rows, text)
    config, sizes, n_programs = _placement("bwd", text, video)
    every = [*vectors, *text_vectors]
    has_dweight, has_dbias = (
        needs_vectors and any(every[i] is not None for i in slots)
        for slots in ((0, 1, 4, 5), (2, 3, 6, 7))
    )
    sum_dtype = torch.promote_types(projections[0].dtype, torch.float32)
    shape = (sum(n_programs), 4, video[0].shape[-1])
    partial = projections[0].new_empty(shape, dtype=sum_dtype) if needs_vectors else None
    if sum(n_programs):
        _qk_norm_rope_bwd_kernel[(sum(n_programs),)](
            *_pointers(text_dy or dy), *_pointers(text or video),
            tuple(text_vectors if text_projections else vectors),
            *_pointers(text_dx_parts or dx_parts),
            *_pointers(dy), *_pointers(video), tuple(vectors), *_pointers(dx_parts), partial,
            positions, _position_strides(positions), *sizes, eps, math.log2(theta),
            **_constants(
                config, video, axes, norm, HAS_TEXT=bool(text),
                HAS_DWEIGHT=has_dweight, HAS_DBIAS=has_dbias,
            ),
        )  # fmt: skip
    if partial is None:
        return [*dx, *text_dx]
    # text rows of one sequence share the vectors of its video rows
    n_text_programs = n_programs[0] if text_projections else 0
    sums = [*partial[n_text_programs:].sum(0), *partial[:n_text_programs].sum(0)]
    found = [
        s.to(x.dtype, copy=True)  # no views of one tensor
        for s, x in zip(sums, every, strict=True)
        if x is not None
    ]
    return [*dx, *text_dx, *found]


def _placement(
    kernel: str, text: list[Tensor], video: list[Tensor]
) -> tuple[RowConfig, tuple[int, ...], list[int]]:
    """Launch configuration, sizes that kernels take, programs of text and of video."""
    n_batch, n_heads, n_video, head_dim = video[0].shape
    n_text = text[0].shape[2] if text else 0
    config = lookup(f"qk_norm_rope_{kernel}", head_dim, architecture(video[0]))
    n_groups = -(-n_heads // config.tiles)
    n_programs = [n_batch * n_groups * -(-n // config.rows) for n in (n_text, n_video)]
    return config, (n_batch, n_heads, n_text, n_video), n_programs


def _pointers(part: list[Tensor]) -> tuple[tuple[Tensor, ...], tuple[tuple[int, ...], ...]]:
    return tuple(part), tuple(x.stride()[:3] for x in part)


def _position_strides(positions: Tensor | None) -> tuple[int, ...]:
    if positions is None:
        return 0, 0, 0
    batch, token, axis = positions.stride()
    return batch if len(positions) > 1 else 0, token, axis


def _constants(
    config: RowConfig, video: list[Tensor], axes: list[int] | None, norm: str | None, **flags: bool
) -> dict:
    head_dim = video[0].shape[-1]
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "AXES": tuple(axes or ()),
        "ROTATE": axes is not None,
        "NORM": norm,
        "ACC": accumulator_dtype(video[0].dtype),
        **flags,
        **config.kwargs(),
    }
