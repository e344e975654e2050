"""`qk_norm_rope`: from the projection to normalised, rotated queries and keys of every head.

The operator and its checks; `kernels.py` holds the formulas and the kernels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.front_door import (
    MAX_HEAD_DIM,
    autocast_dtype,
    check_number,
    check_tensor,
    contiguous_rows,
    is_int_or_symbol,
    refuse_tangents,
)
from ..common.registration import define_op, refuse_double_backward
from . import portable
from .kernels import launch_bwd, launch_fwd
from .portable import empty_results, gradients_like, parts_of, thirds

NORMS = ("rms", "layer", None)


def _empty_fwd(projections, text_projections, *options) -> list[Tensor]:
    *_, n_heads, text_length, _, _, _, _, dtype = options
    text, video = parts_of(projections, text_projections, text_length, n_heads)
    return empty_results(text, video, dtype)


def _empty_bwd(gradients, projections, text_projections, *options) -> list[Tensor]:
    needs_vectors = options[-1]
    vectors = [x.new_empty(x.shape) for x in options[:8] if x is not None and needs_vectors]
    return [*gradients_like(projections), *gradients_like(text_projections), *vectors]


forward_op = define_op("qk_norm_rope_fwd", launch_fwd, portable.qk_norm_rope_fwd, _empty_fwd)
backward_op = define_op("qk_norm_rope_bwd", launch_bwd, portable.qk_norm_rope_bwd, _empty_bwd)


def _setup_context(ctx, inputs, output):
    projections, text_projections, *others = inputs
    ctx.n_projections, ctx.n_text_projections = len(projections), len(text_projections)
    ctx.options = others[9:-1]
    ctx.save_for_backward(*projections, *text_projections, *others[:9])
    ctx.set_materialize_grads(False)


def _backward(ctx, gradients):
    saved = list(ctx.saved_tensors)
    n, n_text = ctx.n_projections, ctx.n_text_projections
    projections, text_projections, others = saved[:n], saved[n : n + n_text], saved[n + n_text :]
    needs_vectors = any(ctx.needs_input_grad[2:10])
    if all(g is None for g in gradients):
        return [None] * n, [None] * n_text, *[None] * 16
    results = backward_op(
        _with_zeros(gradients), projections, text_projections, *others, *ctx.options, needs_vectors,
    )  # fmt: skip
    dx, text_dx, found = results[:n], results[n : n + n_text], iter(results[n + n_text :])
    vectors = [next(found) if needs_vectors and x is not None else None for x in others[:8]]
    return dx, text_dx, *vectors, *[None] * 8


def _with_zeros(gradients: list[Tensor | None]) -> list[Tensor]:
    """Replaces None by zeros, expanded from one row to save memory."""
    like = next(g for g in gradients if g is not None)
    return [
        like.new_zeros(like.shape[-1]).expand(like.shape) if g is None else g for g in gradients
    ]


forward_op.register_autograd(_backward, setup_context=_setup_context)
refuse_double_backward(backward_op)


class QKVStream(NamedTuple):
    """What one stream of tokens gives to attention.

    ``projections``: [B, T, 3 * H * D], q, k and v one after another, or a tuple of three
    [B, T, H * D]; heads are neighbours. Weights and biases [D] of the norms of q and k.
    """

    projections: Tensor | tuple[Tensor, Tensor, Tensor]
    q_weight: Tensor | None = None
    k_weight: Tensor | None = None
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None


def qk_norm_rope(
    stream: QKVStream,
    positions: Tensor | None = None,  # [T_video, A] or [B, T_video, A]
    axes: Sequence[int] = (),
    *,
    n_heads: int,
    text: QKVStream | None = None,
    text_length: int = 0,
    norm: str | None = "rms",
    eps: float = 1e-6,
    theta: float = 10000.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of attention from projections: norm per head, rotation by position, layout.

    Args:
        stream: of all tokens, or of the video tokens where ``text`` is given. bf16, fp16, fp32 or
            fp64, any strides; weights and biases of any of these dtypes.
        positions: coordinates of the video tokens on every axis, fp32 or fp64; they get no
            gradient. None: no rotation.
        axes: how many columns of a head each axis turns: even, their sum is D. An axis of two
            columns rotates them by its position in radians, so D / 2 such axes can express any
            rotation.
        text: a stream of its own, whose tokens come first in the results and are not rotated.
        text_length: the tokens at the front of a single stream that are not rotated.
        norm: "rms", "layer", or None; statistics in fp32 (fp64 for fp64).
        eps: added to the mean square.
        theta: base of the frequencies ``theta^(-2i / d)``.

    Returns:
        q, k, v ``[B, H, T, D]``, contiguous, in the dtype of the projections, or that of autocast.
        Where no gradient is recorded and no text stream is joined, v is a view of its projection.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit.
        NotImplementedError: double backward, forward-mode derivatives.
    """
    projections = _check_stream("stream", stream, n_heads)
    text_projections = [] if text is None else _check_stream("text", text, n_heads)
    _check_options(projections, text_projections, n_heads, text_length, norm, eps, theta)
    vectors = [*stream[1:], *(text or QKVStream(stream.projections))[1:]]
    head_dim = _head_dim(projections, n_heads)
    _check_vectors(vectors, projections[0], head_dim, norm)
    vectors = list(map(contiguous_rows, vectors))
    axes = _as_widths(axes)
    _check_positions(positions, axes, projections[0], text_length, head_dim)
    tensors = [*projections, *text_projections, *(x for x in vectors if x is not None)]
    refuse_tangents(*tensors)
    if positions is None and text is None:
        text_length = 0  # text rows are like the others
    elif positions is not None:
        positions = positions[None] if positions.ndim == 2 else positions
    dtype = autocast_dtype(projections[0])
    v = None
    records = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if text is None and not records and dtype == projections[0].dtype:
        *projections, v = thirds(projections)
        v = v.unflatten(-1, (n_heads, head_dim)).transpose(1, 2)
    results = forward_op(
        projections, text_projections, *vectors, positions, n_heads, text_length,
        axes or None, norm, float(eps), float(theta), dtype,
    )  # fmt: skip
    q, k, v = results if v is None else (*results, v)
    return q, k, v


def _check_stream(name: str, stream: QKVStream, n_heads: int) -> list[Tensor]:
    """The projections of a stream, one or three."""
    if not isinstance(stream, QKVStream):
        raise ValueError(f"{name}: expected a QKVStream, got {type(stream).__name__}")
    if not is_int_or_symbol(n_heads) or n_heads < 1:
        raise ValueError(f"n_heads: expected an int of at least 1, got {n_heads}")
    given = stream.projections
    projections = [given] if isinstance(given, Tensor) else list(given)
    if len(projections) not in (1, 3):
        raise ValueError(
            f"{name}: expected one fused projection or a tuple of three, got {len(projections)}"
        )
    for x in projections:
        check_tensor(name, x)
        if x.ndim != 3:
            raise ValueError(f"{name}: expected projections [B, T, H * D], got {list(x.shape)}")
        if x.shape != projections[0].shape:
            expected, actual = list(projections[0].shape), list(x.shape)
            raise ValueError(f"{name}: expected k and v of shape {expected} as q has, got {actual}")
    width = n_heads * (3 if len(projections) == 1 else 1)
    if projections[0].shape[2] % width:
        raise ValueError(
            f"{name}: expected projections of a multiple of {width} columns "
            f"for {n_heads} heads, got {projections[0].shape[2]}"
        )
    return [contiguous_rows(x) for x in projections]


def _head_dim(projections: list[Tensor], n_heads: int) -> int:
    return projections[0].shape[2] // n_heads // (3 if len(projections) == 1 else 1)


def _check_options(
    projections: list[Tensor], text_projections: list[Tensor],
    n_heads: int, text_length: int, norm: str | None, eps: float, theta: float,
) -> None:  # fmt: skip
    first, head_dim = projections[0], _head_dim(projections, n_heads)
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"stream: expected a head dim of 1 to {MAX_HEAD_DIM}, got {head_dim}")
    for x in (*projections, *text_projections):
        check_tensor("projections", x, ("the first projection", first))
        if x.dtype != first.dtype:
            raise ValueError(f"projections: expected dtype {first.dtype} of all, got {x.dtype}")
    if text_projections:
        expected = first.shape[0], head_dim
        actual = text_projections[0].shape[0], _head_dim(text_projections, n_heads)
        if actual != expected:
            raise ValueError(f"text: expected batch and head dim {expected}, got {actual}")
        if text_length:
            raise ValueError(f"text_length: expected 0 beside a text stream, got {text_length}")
    if not is_int_or_symbol(text_length) or not 0 <= text_length <= first.shape[1]:
        raise ValueError(f"text_length: expected 0 to {first.shape[1]}, got {text_length}")
    if norm not in NORMS:
        raise ValueError(f"norm: expected one of {NORMS}, got {norm!r}")
    check_number("eps", eps, low=0)
    check_number("theta", theta)
    if theta <= 0:
        raise ValueError(f"theta: expected a finite number above 0, got {theta}")


def _check_vectors(
    vectors: Sequence[Tensor | None], first: Tensor, head_dim: int, norm: str | None
) -> None:
    for name, x in zip(2 * QKVStream._fields[1:], vectors, strict=True):
        if x is None:
            continue
        if norm is None or (norm == "rms" and name.endswith("bias")):
            raise ValueError(f"{name}: expected None for norm={norm!r}, got a tensor")
        check_tensor(name, x, ("the projection", first))
        if x.shape != (head_dim,):
            raise ValueError(f"{name}: expected shape [{head_dim}], got {list(x.shape)}")


def _as_widths(axes: Sequence[int]) -> list[int]:
    if not all(is_int_or_symbol(width) for width in axes):
        raise ValueError(f"axes: expected integers, got {list(axes)}")
    return [int(width) for width in axes]


def _check_positions(
    positions: Tensor | None, axes: list[int], first: Tensor, text_length: int, head_dim: int
) -> None:
    if positions is None:
        if axes:
            raise ValueError(f"positions: expected coordinates for axes {axes}, got None")
        return
    if sum(axes) != head_dim or any(width < 2 or width % 2 for width in axes):
        raise ValueError(f"axes: expected even widths that sum to {head_dim}, got {axes}")
    check_tensor("positions", positions, ("the projection", first))
    if positions.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"positions: expected dtype float32 or float64, got {positions.dtype}")
    shape = first.shape[1] - text_length, len(axes)
    if positions.shape not in (shape, (1, *shape), (first.shape[0], *shape)):
        raise ValueError(
            f"positions: expected shape {list(shape)}, with or without batch {first.shape[0]}, "
            f"got {list(positions.shape)}"
        )
