"""QK norm and rotation on a CPU, for a chunk of tokens with all heads, which stays in cache.

A pair (a, b) of neighbouring columns is a complex number, and its rotation one complex product.
Arithmetic is in fp32 (fp64 for fp64), rounded once at the end. Formulas: `kernels.py`.

This file also makes the views that the kernels work on. A *part* is a run of rows that share
weights: ``[q, k, v]`` or ``[q, k]``, each [B, H, n, D].
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 2**18  # elements of q: 1 MB in fp32

Part = list[Tensor]
Vector = Tensor | None


def thirds(projections: list[Tensor]) -> list[Tensor]:
    """q, k and v from a fused projection; three separate projections are returned as they are."""
    return list(projections[0].chunk(3, dim=-1)) if len(projections) == 1 else projections


def parts_of(
    projections: list[Tensor], text_projections: list[Tensor], text_length: int, n_heads: int
) -> tuple[Part, Part]:
    """Views of text and video; text is empty where there is none."""
    text, video = _split_heads(text_projections, n_heads), _split_heads(projections, n_heads)
    if not text_length:
        return text, video
    return [x[:, :, :text_length] for x in video], [x[:, :, text_length:] for x in video]


def split_results(results: list[Tensor], text: Part) -> tuple[Part, Part]:
    """Views of ``results`` [B, H, T, D] for the rows of text, which come first, and of video."""
    if not text:
        return [], results
    n_text = text[0].shape[2]
    return [x[:, :, :n_text] for x in results], [x[:, :, n_text:] for x in results]


def empty_results(text: Part, video: Part, dtype: torch.dtype) -> list[Tensor]:
    n_batch, n_heads, n_tokens, head_dim = video[0].shape
    shape = n_batch, n_heads, n_tokens + (text[0].shape[2] if text else 0), head_dim
    return [x.new_empty(shape, dtype=dtype) for x in video]


def gradients_like(projections: list[Tensor]) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in projections]  # contiguous, whatever the strides of x


def _split_heads(projections: list[Tensor], n_heads: int) -> Part:
    """Views [B, H, T, D] of [B, T, H * D]; one fused projection holds three of them."""
    return [
        x.unflatten(-1, (n_heads, x.shape[-1] // n_heads)).transpose(1, 2)
        for x in thirds(projections)
    ]


def _zero_sums(like: Tensor) -> list[Tensor]:
    return [like.new_zeros(like.shape[-1], dtype=_wide(like)) for _ in range(4)]


def qk_norm_rope_fwd(
    projections: list[Tensor],
    text_projections: list[Tensor],
    q_weight: Vector,
    k_weight: Vector,
    q_bias: Vector,
    k_bias: Vector,
    text_q_weight: Vector,
    text_k_weight: Vector,
    text_q_bias: Vector,
    text_k_bias: Vector,
    positions: Tensor | None,
    n_heads: int,
    text_length: int,
    axes: list[int] | None,
    norm: str | None,
    eps: float,
    theta: float,
    dtype: torch.dtype,
) -> list[Tensor]:
    """``[q, k, v]``, or ``[q, k]``, each [B, H, T, D] of ``dtype``."""
    text, video = parts_of(projections, text_projections, text_length, n_heads)
    results = empty_results(text, video, dtype)
    text_y, y = split_results(results, text)
    vectors = [q_weight, k_weight, q_bias, k_bias]
    text_vectors = [text_q_weight, text_k_weight, text_q_bias, text_k_bias]
    _part_forward(text, text_y, text_vectors if text_projections else vectors, None, norm, eps)
    rotation = _rotation(positions, axes, theta, _wide(video[0]))
    _part_forward(video, y, vectors, rotation, norm, eps)
    return results


def qk_norm_rope_bwd(
    gradients: list[Tensor],
    projections: list[Tensor],
    text_projections: list[Tensor],
    q_weight: Vector,
    k_weight: Vector,
    q_bias: Vector,
    k_bias: Vector,
    text_q_weight: Vector,
    text_k_weight: Vector,
    text_q_bias: Vector,
    text_k_bias: Vector,
    positions: Tensor | None,
    n_heads: int,
    text_length: int,
    axes: list[int] | None,
    norm: str | None,
    eps: float,
    theta: float,
    needs_vectors: bool,
) -> list[Tensor]:
    """Gradients of the projections and, if needed, of the weights and biases that are there."""
    text, video = parts_of(projections, text_projections, text_length, n_heads)
    dx, text_dx = gradients_like(projections), gradients_like(text_projections)
    text_dx_part, dx_part = parts_of(dx, text_dx, text_length, n_heads)
    text_dy, dy = split_results(gradients, text)
    vectors = [q_weight, k_weight, q_bias, k_bias]
    text_vectors = [text_q_weight, text_k_weight, text_q_bias, text_k_bias]
    sums, text_sums = _zero_sums(video[0]), _zero_sums(video[0])
    # text rows of one sequence share the vectors of its video rows
    shared = (text_vectors, text_sums) if text_projections else (vectors, sums)
    rotation = _rotation(positions, axes, theta, _wide(video[0]))
    _part_backward(text_dy, text, text_dx_part, *shared, None, norm, eps, needs_vectors)
    _part_backward(dy, video, dx_part, vectors, sums, rotation, norm, eps, needs_vectors)
    found = zip([*sums, *text_sums], [*vectors, *text_vectors], strict=True)
    return [*dx, *text_dx, *(s.to(x.dtype) for s, x in found if x is not None and needs_vectors)]


class _Rotation(NamedTuple):
    positions: Tensor  # [B or 1, T, A]
    axes: list[int]
    theta: float
    dtype: torch.dtype

    def __call__(self, batch: int, rows: slice) -> Tensor:
        """Complex numbers of length 1, [rows, 1, D / 2]."""
        positions = self.positions[batch if len(self.positions) > 1 else 0, rows].double()
        angles = torch.cat(
            [
                positions[:, i, None] * self.theta ** (-torch.arange(0, d, 2).double() / d)
                for i, d in enumerate(self.axes)
            ],
            dim=-1,
        )
        return torch.complex(angles.cos().to(self.dtype), angles.sin().to(self.dtype))[:, None]


def _rotation(
    positions: Tensor | None, axes: list[int] | None, theta: float, dtype: torch.dtype
) -> _Rotation | None:
    if positions is None or axes is None:
        return None
    return _Rotation(positions, axes, theta, dtype)


def _part_forward(
    part: Part,
    results: Part,
    vectors: list[Vector],
    rotation: _Rotation | None,
    norm: str | None,
    eps: float,
) -> None:
    for batch, rows in _chunks(part):
        turn = None if rotation is None else rotation(batch, rows)
        xs, ys = _cut(part, batch, rows), _cut(results, batch, rows)
        for i, (x, y) in enumerate(zip(xs[:2], ys[:2], strict=True)):
            n = x.to(_wide(x))
            if norm is not None:
                n, _ = _normalize(n, norm, eps)
                weight, bias = vectors[i], vectors[i + 2]
                if weight is not None:
                    n *= weight.to(n.dtype)
                if bias is not None:
                    n += bias.to(n.dtype)
            _rotate(n, turn, y)
        for x, y in zip(xs[2:], ys[2:], strict=True):
            y.copy_(x)


def _part_backward(
    gradients: Part,
    part: Part,
    results: Part,
    vectors: list[Vector],
    sums: list[Tensor],
    rotation: _Rotation | None,
    norm: str | None,
    eps: float,
    needs_vectors: bool,
) -> None:
    """Writes the gradient of the part to ``results``, adds those of ``vectors`` to ``sums``."""
    for batch, rows in _chunks(part):
        turn = None if rotation is None else rotation(batch, rows).conj_physical()
        dys, xs, dxs = (_cut(x, batch, rows) for x in (gradients, part, results))
        for i, (dy, x, dx) in enumerate(zip(dys[:2], xs[:2], dxs[:2], strict=True)):
            wide = _wide(x)
            if norm is None:
                _rotate(dy.to(wide), turn, dx)
                continue
            dn = torch.empty(x.shape, dtype=wide)
            _rotate(dy.to(wide), turn, dn)
            xhat, rstd = _normalize(x.to(wide), norm, eps)
            product = dn * xhat
            if needs_vectors:
                sums[i] += product.sum(dim=(0, 1))
                sums[i + 2] += dn.sum(dim=(0, 1))
            weight = vectors[i]
            if weight is None:
                mean = product.mean(dim=-1, keepdim=True)
            else:
                dn *= weight.to(wide)
                mean = (product @ weight.to(wide))[..., None] / len(weight)
            dn.addcmul_(xhat, mean, value=-1)
            if norm == "layer":
                dn -= dn.mean(dim=-1, keepdim=True)  # that of xhat is 0
            torch.mul(dn, rstd, out=dx) if dx.dtype == wide else dx.copy_(dn * rstd)
        for dy, dx in zip(dys[2:], dxs[2:], strict=True):
            dx.copy_(dy)


def _chunks(part: Part) -> Iterator[tuple[int, slice]]:
    """Batch row and tokens of every chunk."""
    if not part:
        return
    n_batch, n_heads, n_tokens, head_dim = part[0].shape
    step = max(1, CHUNK // (n_heads * head_dim))
    for batch in range(n_batch):
        for start in range(0, n_tokens, step):
            yield batch, slice(start, min(start + step, n_tokens))


def _cut(part: Part, batch: int, rows: slice) -> list[Tensor]:
    """Tokens before heads, as the projection has them: [rows, H, D]."""
    return [x[batch, :, rows].transpose(0, 1) for x in part]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _normalize(x: Tensor, norm: str, eps: float) -> tuple[Tensor, Tensor]:
    """xhat, a new tensor, and rstd. At these short rows faster than `native_layer_norm`."""
    if norm == "layer":
        x = x - x.mean(dim=-1, keepdim=True)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    rstd = (length.square_() / x.shape[-1]).add_(eps).rsqrt_()
    return x * rstd, rstd


def _rotate(x: Tensor, turn: Tensor | None, out: Tensor) -> None:
    """Writes x [rows, H, D], its pairs turned, to ``out`` of any dtype and layout."""
    if turn is None:
        out.copy_(x)
    elif out.dtype == x.dtype:
        torch.mul(_as_complex(x), turn, out=_as_complex(out))
    else:
        out.copy_(torch.view_as_real(_as_complex(x) * turn).flatten(-2))


def _as_complex(x: Tensor) -> Tensor:
    if x.stride(-1) != 1 or any(n % 2 for n in (*x.stride()[:-1], x.storage_offset())):
        # copies inputs, also contiguous ones at an odd offset; results always have even strides
        x = x.clone(memory_format=torch.contiguous_format)
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))
