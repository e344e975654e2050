"""`residual_norm`: gated residual, norm and modulation of tokens in one pass.

    h = x + gate * f
    a = norm(h) * weight + bias, then * (1 + scale) + shift

One operator serves it and `feature_cache`; `residual_norm.py` holds the kernels and the formulas.
Modulations are per sample or per token, and text tokens may have their own (CogVideoX, 2408.06072):
a list of the operator holds the vectors of the other tokens, then those of the text.

Shapes: x, f, h, a [B, T, D]; weight, bias [D]; gate, scale, shift as `Modulation` says.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.front_door import (
    autocast_dtype,
    check_last_dim,
    check_tensor,
    is_int_or_symbol,
    refuse_tangents,
)
from ..common.registration import define_op, refuse_double_backward
from . import residual_norm_portable as portable
from .configs import ROW_WISE
from .residual_norm_kernels import empty_bwd, empty_fwd, given, launch_bwd, launch_fwd, widest

NORMS = ("layer", "rms")
MAX_ROW = max(ROW_WISE["residual_norm_bwd"])


class Modulation(NamedTuple):
    """What the text tokens have for their own: each [D], [B, D], [B, 1, D] or, per token,
    [B, text_length, D]; any floating dtype, any strides with a contiguous last dim."""

    gate: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None


class Cached(NamedTuple):
    """What a feature cache adds to `run`."""

    gate: Tensor  # one element
    n_entries: int  # at least 2
    entries: list[Tensor]  # their sum and y are the new total
    older: list[Tensor]  # what backward reads in place of entries, if any
    sum_dtype: torch.dtype
    keep_total: bool


def _portable_fwd(
    x, f, entries, older, cache_gate, gate, scale, shift, weight, bias, text_length, n_entries,
    norm, eps, a_dtype, sum_dtype, keep_total, keep_y,
):  # fmt: skip
    if norm == "layer" and f is None and cache_gate is None:
        empty = x.new_empty(0), x.new_empty(0, dtype=sum_dtype), x.new_empty(0)
        if not (scale or shift):
            a, stats = portable.layer_norm(x, weight, bias, eps, a_dtype)
            return empty[0], a, *empty[1:], stats
        if len(scale) < 2 and len(shift) < 2 and a_dtype == x.dtype:
            scale_, shift_ = (vectors[0] if vectors else None for vectors in (scale, shift))
            if portable.is_small(x, scale_, shift_, weight, bias):
                a, stats = portable.small_layer_norm(x, weight, bias, scale_, shift_, eps)
                return empty[0], a, *empty[1:], stats
    results = empty_fwd(
        x, f, entries, older, cache_gate, gate, scale, shift, weight, bias, text_length, n_entries,
        norm, eps, a_dtype, sum_dtype, keep_total, keep_y,
    )  # fmt: skip
    portable.residual_norm_fwd(
        *map(given, results), x, f, entries, cache_gate, gate, scale, shift, weight, bias,
        text_length, n_entries, norm == "rms", eps, sum_dtype,
    )  # fmt: skip
    return results


def _portable_bwd(
    dh, da, dtotal, dy, y, stats, f, entries, cache_gate, gate, scale, weight, bias,
    text_length, n_entries, norm, f_dtype, entries_dtype, sum_dtype, need_f, need_entries,
    need_scale, need_affine, per_sample,
):  # fmt: skip
    is_whole = (
        norm == "layer" and cache_gate is None and not (gate or per_sample) and len(scale) < 2
        and da is not None and da.dtype == y.dtype == stats.dtype
        and (not scale or portable.is_small(y, *scale))
    )  # fmt: skip
    results = empty_bwd(  # PyTorch makes dx and dscale of a whole: nothing is there to be filled
        dh, da, dtotal, dy, y[:, :0] if is_whole else y, stats, f, entries, cache_gate, gate, scale,
        weight, bias, text_length, n_entries, norm, f_dtype, entries_dtype, sum_dtype, need_f,
        need_entries, need_scale and not is_whole, need_affine, per_sample,
    )  # fmt: skip
    if is_whole:
        _, df, dentries, dcache_gate, dgate, dscale, sums = results
        dx, found = portable.layer_norm_gradients(
            given(sums), dh, da, dy, y, stats, *scale or [None], weight, bias, need_scale
        )
        dscale = dscale if found is None else found
        return dx, df, dentries, dcache_gate, dgate, dscale, sums
    portable.residual_norm_bwd(
        *map(given, results), dh, da, dtotal, dy, y, stats, f, entries, cache_gate, gate, scale,
        weight, bias, text_length, n_entries, norm == "rms", sum_dtype, need_affine,
    )  # fmt: skip
    return results


forward_op = define_op("residual_norm_fwd", launch_fwd, _portable_fwd, empty_fwd)
backward_op = define_op("residual_norm_bwd", launch_bwd, _portable_bwd, empty_bwd)


def _setup_context(ctx, inputs, output) -> None:
    x, f, entries, older, cache_gate, gate, scale, shift, weight, bias, *options = inputs
    ctx.text_length, ctx.n_entries, ctx.norm, _, _, ctx.sum_dtype, *_ = options
    ctx.f_dtype = x.dtype if f is None else f.dtype
    ctx.entry_dtypes, ctx.n_older = [entry.dtype for entry in entries], len(older)
    y = x if f is None else output[0] if cache_gate is None else output[3]
    if given(y) is None:
        raise RuntimeError(
            "residual_norm_fwd: traced without gradients, it keeps nothing for a backward;"
            " trace it with inputs that require them"
        )
    f = f if any(v.requires_grad for v in gate) else None  # only dgate reads it
    groups = gate, scale, shift, older or entries
    ctx.n_saved = [len(group) for group in groups]
    stats = given(output[4])
    vectors = (v for group in groups for v in group)
    ctx.save_for_backward(y, stats, f, cache_gate, weight, bias, *vectors)
    ctx.mark_non_differentiable(output[4])
    ctx.set_materialize_grads(False)


def _backward(ctx, dh, da, dtotal, dy, _):
    dh, da, dtotal, dy = (g if g is None else given(g) for g in (dh, da, dtotal, dy))
    y, stats, f, cache_gate, weight, bias, *rest = ctx.saved_tensors
    gate, scale, shift, entries = ([rest.pop(0) for _ in range(n)] for n in ctx.n_saved)
    # x, f, entries, older, cache_gate, gate, scale, shift, weight, bias
    _, need_f, need_entries, _, _, _, need_scale, need_shift, *need_weights = [
        any(need) if isinstance(need, list) else need for need in ctx.needs_input_grad[:10]
    ]
    is_per_token = portable.has_vector_per_token([*gate, *scale, *shift])
    need_vectors = not is_per_token and (need_scale or need_shift)
    need_affine = da is not None and (any(need_weights) or need_vectors)
    per_sample = not is_per_token and any(ctx.n_saved[:3])
    dx, df, dentries, dcache_gate, dgate, dscale, sums = map(
        given,
        backward_op(
            dh, da, dtotal, dy, y, stats, f, entries, cache_gate, gate, scale, weight, bias,
            ctx.text_length, ctx.n_entries, ctx.norm, ctx.f_dtype,
            widest(ctx.entry_dtypes or [y.dtype]), ctx.sum_dtype,
            need_f and bool(gate), need_entries, need_scale and da is not None,
            need_affine, per_sample,
        ),
    )  # fmt: skip
    dweight, dbias = None, None
    if need_affine and any(need_weights):
        assert sums is not None
        dweight, dbias = _gradients_of_weights(sums, [] if is_per_token else scale)
    if is_per_token:
        parts = slice(ctx.text_length, None), slice(0, ctx.text_length)
        dgates, dscales, dshifts = (
            [None if g is None else g[:, part] for part in parts] for g in (dgate, dscale, da)
        )
    else:
        if sums is not None and len(sums) < max(ctx.n_saved[:3]):  # a text without tokens
            sums = torch.cat([sums, torch.zeros_like(sums)])
        dgates, dscales, dshifts = _gradients_of_vectors(sums, need_affine, weight, bias)
    return (
        dx,
        _like(ctx.f_dtype, dx if df is None else df) if need_f else None,
        [_like(dtype, dentries) for dtype in ctx.entry_dtypes],
        [None] * ctx.n_older,
        None if dcache_gate is None else dcache_gate.to(cache_gate.dtype).view(cache_gate.shape),
        [_like(v.dtype, g, len(v)) for v, g in zip(gate, dgates, strict=False)],
        [_like(v.dtype, g, len(v)) for v, g in zip(scale, dscales, strict=False)],
        [_like(v.dtype, g, len(v)) for v, g in zip(shift, dshifts, strict=False)],
        _like(weight.dtype, dweight) if weight is not None else None,
        _like(bias.dtype, dbias) if bias is not None else None,
        *[None] * 8,
    )


def _gradients_of_weights(sums: Tensor, scale: list[Tensor]) -> tuple[Tensor, Tensor]:
    """dweight and dbias, from sums that lack the factor 1 + scale where ``scale`` is given."""
    sums = sums[:, :, :2]
    parts = [s * (1 + v.to(s.dtype)) for v, s in zip(scale, sums, strict=False)] or [*sums]
    dbias, dweight = sum(parts[1:], start=parts[0]).sum(dim=0)
    return dweight, dbias


def _gradients_of_vectors(
    sums: Tensor | None, has_affine: bool, weight: Tensor | None, bias: Tensor | None
) -> tuple[list, list, list]:
    """Gradients [B, 1, D] of gate, scale and shift, of each modality."""
    dgates: list[Tensor | None] = [None, None]
    dscales, dshifts = dgates.copy(), dgates.copy()
    for i, s in enumerate(() if sums is None else sums):  # [B, 1 to 3, D]
        if has_affine:
            dshifts[i] = sum_da = s[:, 0:1]
            dscale = s[:, 1:2] if weight is None else s[:, 1:2] * weight
            dscales[i] = dscale if bias is None else dscale + sum_da * bias
        if s.shape[1] != 2:
            dgates[i] = s[:, -1:]
    return dgates, dscales, dshifts


def _like(dtype: torch.dtype, grad: Tensor | None, n_batch: int | None = None) -> Tensor | None:
    """``grad`` in ``dtype``, summed over the batch where that has one row for all."""
    if grad is None:
        return None
    grad = grad.sum(dim=0, keepdim=True) if n_batch == 1 and len(grad) > 1 else grad
    return grad.to(dtype)


forward_op.register_autograd(_backward, setup_context=_setup_context)
refuse_double_backward(backward_op)


def run(
    x: Tensor,
    f: Tensor | None,
    own: Modulation,
    text: Modulation | None,
    text_length: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "",
    eps: float = 0.0,
    cached: Cached | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Checks, then the operator: h, a, total, y; None for a that has no norm, for what is not kept,
    and for y where neither the caller nor backward needs it."""
    gate, scale, shift = _prepare(x, f, own, text, text_length, weight, bias, norm, eps)
    tensors = [x, f, weight, bias, *gate, *scale, *shift]
    keep_y = False
    if cached is not None:
        tensors += [cached.gate, *cached.entries]
        if f is not None and torch.is_grad_enabled():
            keep_y = any(t is not None and t.requires_grad for t in tensors)
    refuse_tangents(*tensors)
    h, a, total, y, _ = map(
        given,
        forward_op(
            x, f, cached.entries if cached else [], cached.older if cached else [],
            cached.gate if cached else None, gate, scale, shift, weight, bias, text_length,
            cached.n_entries if cached else 1, norm, eps, autocast_dtype(x),
            cached.sum_dtype if cached else x.dtype, cached.keep_total if cached else False, keep_y,
        ),
    )  # fmt: skip
    h = x if h is None else h
    return h, a, total, x if f is None else h if cached is None else y


def _prepare(
    x: Tensor,
    f: Tensor | None,
    own: Modulation,
    text: Modulation | None,
    text_length: int,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
) -> list[list[Tensor]]:
    """ValueError unless the kernels take these; the vectors of gate, scale and shift."""
    check_tensor("x", x)
    if x.ndim != 3 or not 1 <= x.shape[2] <= MAX_ROW:
        expected = f"[B, T, D] with D of 1 to {MAX_ROW}"
        raise ValueError(f"x: expected shape {expected}, got {list(x.shape)}")
    check_last_dim("x", x)
    if f is not None:
        check_like("f", f, x)
    if f is None and own.gate is not None:
        raise ValueError("gate: expected None without f, got a tensor")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            check_columns(name, vector, x)
    if norm not in ("", *NORMS):
        raise ValueError(f"norm: expected one of {', '.join(NORMS)}, got {norm}")
    if norm and not 0 < eps < math.inf:
        raise ValueError(f"eps: expected a finite number above 0, got {eps}")
    n_tokens = x.shape[1]
    if not is_int_or_symbol(text_length) or not 0 <= text_length <= n_tokens:
        raise ValueError(f"text_length: expected 0 to {n_tokens} tokens, got {text_length}")
    if text is None and text_length != 0:
        raise ValueError(f"text: expected a Modulation for {text_length} text tokens, got None")
    kinds: list[list[Tensor]] = []
    is_per_token = False
    for name, vector, of_text in zip(Modulation._fields, own, text or own, strict=True):
        if (vector is None) != (of_text is None):
            expected = "None" if vector is None else "a tensor"
            raise ValueError(f"text.{name}: expected {expected} as {name} is, got the other")
        vectors: list[Tensor] = []
        if vector is not None:
            vectors.append(as_vectors(name, vector, x, n_tokens - text_length))
            if text is not None and of_text is not None:
                vectors.append(as_vectors(f"text.{name}", of_text, x, text_length))
            is_per_token = is_per_token or portable.has_vector_per_token(vectors)
        kinds.append(vectors)
    if is_per_token:
        sizes = n_tokens - text_length, text_length
        kinds = [
            [expand_vectors(v, x.shape[0], n) for v, n in zip(vectors, sizes, strict=False)]
            for vectors in kinds
        ]
    return kinds


def check_like(name: str, tensor: Tensor, x: Tensor) -> None:
    """ValueError unless the kernels can read ``tensor`` beside ``x``."""
    check_tensor(name, tensor, ("x", x))
    if tensor.shape != x.shape:
        raise ValueError(
            f"{name}: expected shape {list(x.shape)} as x has, got {list(tensor.shape)}"
        )
    check_last_dim(name, tensor)


def check_columns(name: str, vector: Tensor, x: Tensor) -> None:
    """ValueError unless ``vector`` is [D], as the rows of ``x`` are long."""
    check_tensor(name, vector, ("x", x))
    if vector.shape != x.shape[-1:]:
        raise ValueError(f"{name}: expected shape [{x.shape[-1]}], got {list(vector.shape)}")
    check_last_dim(name, vector)


def as_vectors(name: str, v: Tensor, x: Tensor, n_tokens: int) -> Tensor:
    """A view [B or 1, n_tokens or 1, D]."""
    check_tensor(name, v, ("x", x))
    n_batch, _, n_cols = x.shape
    given_shape = v.shape
    v = v[None, None] if v.ndim == 1 else v[:, None] if v.ndim == 2 else v
    if (
        v.ndim != 3
        or v.shape[0] not in (1, n_batch)
        or v.shape[1] not in (1, n_tokens)
        or v.shape[2] != n_cols
    ):
        expected = f"[{n_cols}], [{n_batch}, {n_cols}] or [{n_batch}, 1 or {n_tokens}, {n_cols}]"
        raise ValueError(f"{name}: expected shape {expected}, got {list(given_shape)}")
    check_last_dim(name, v)
    return v


def expand_vectors(v: Tensor, n_batch: int, n_tokens: int) -> Tensor:
    """[n_batch, n_tokens, D]: ``v`` itself where it is that already, which most often it is."""
    if v.shape[0] == n_batch and v.shape[1] == n_tokens:
        return v
    return v.expand(n_batch, n_tokens, -1)


def residual_norm(
    x: Tensor,  # [B, T, D]
    f: Tensor | None = None,  # [B, T, D]
    *,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    text: Modulation | None = None,
    text_length: int = 0,
    weight: Tensor | None = None,  # [D]
    bias: Tensor | None = None,  # [D]
    norm: str = "layer",
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """``h = x + gate * f`` and ``a = norm(h) * weight + bias``, then ``* (1 + scale) + shift``.

    Args:
        x, f: bf16, fp16, fp32 or fp64, any strides with a contiguous last dim. Without f, h is x.
        gate, scale, shift: [D], [B, D], [B, 1, D], or [B, T - text_length, D] for a vector per
            token; any floating dtype, read in place. What is None is left out.
        text: the same for the first ``text_length`` tokens of each batch row; None where the
            arguments above are None.
        norm: "layer" or "rms".

    Returns:
        h: in the dtype of x, rounded to it before the norm reads it. x itself without f.
        a: in the dtype of x, or that which autocast asks for.

    Raises:
        ValueError: shapes, dtypes, devices or names that do not fit.
        NotImplementedError: double backward, forward-mode derivatives.
    """
    if norm not in NORMS:
        raise ValueError(f"norm: expected one of {', '.join(NORMS)}, got {norm!r}")
    own = Modulation(gate, scale, shift)
    h, a, _, _ = run(x, f, own, text, text_length, weight, bias, norm, eps)
    assert a is not None
    return h, a
