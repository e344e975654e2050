"""What the operators behind `residual_norm` and `feature_cache` take, and memory for their results.

Shapes and names are those of `residual_norm.py`. A list of vectors (gate, scale, shift) is empty,
or holds those of the video tokens and, if text tokens have their own, those of the text.
"""

from collections.abc import Iterable
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import has_vector_per_token
from .operands import absent, accumulator


class Forward(NamedTuple):
    x: Tensor
    f: Tensor | None
    entries: list[Tensor]  # total is the sum of these and y: one running sum, or all older entries
    older: list[Tensor]  # if there are any, backward sums these instead of `entries`
    cache_gate: Tensor | None  # one element
    gate: list[Tensor]
    scale: list[Tensor]
    shift: list[Tensor]
    weight: Tensor | None
    bias: Tensor | None
    text_length: int
    n_entries: int  # 1 without a cache
    norm: str  # "layer", "rms", or "" for no norm: there is no a
    eps: float
    a_dtype: torch.dtype
    sum_dtype: torch.dtype  # of total
    keep_total: bool  # whether total is returned
    keep_y: bool  # whether y is, beside h


class Backward(NamedTuple):
    dh: Tensor | None
    da: Tensor | None
    dtotal: Tensor | None
    dy: Tensor | None
    y: Tensor  # which is h if there is no cache
    stats: Tensor | None
    f: Tensor | None  # None if the gate needs no gradient
    entries: list[Tensor]
    cache_gate: Tensor | None
    gate: list[Tensor]
    scale: list[Tensor]
    weight: Tensor | None
    bias: Tensor | None
    text_length: int
    n_entries: int
    norm: str
    f_dtype: torch.dtype
    entries_dtype: torch.dtype  # of the gradient that all entries share
    sum_dtype: torch.dtype
    need_f: bool  # whether df is needed beside dx
    need_entries: bool
    need_scale: bool
    need_affine: bool  # whether sums of da and da * xhat are needed
    per_sample: bool  # whether sums are kept apart for each sample of the batch


def empty_fwd(args: Forward) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """h (absent if it is x), a, total, y, and the mean and rstd of the rows of h [2, B, T]."""
    x = args.x
    has_h = args.f is not None or args.cache_gate is not None
    acc = accumulator(x)
    return (
        x.new_empty(x.shape) if has_h else absent(x),
        x.new_empty(x.shape, dtype=args.a_dtype) if args.norm else absent(x),
        x.new_empty(x.shape, dtype=args.sum_dtype) if args.keep_total else absent(x),
        x.new_empty(x.shape) if args.keep_y else absent(x),
        x.new_empty((2, *x.shape[:2]), dtype=acc) if args.norm else absent(x),
    )


def empty_bwd(args: Backward) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, df, the gradient of each entry, that of the cache gate, dgate and dscale, sums.

    dgate and dscale exist if they are per token; else they follow from the sums over tokens
    [1 or 2 modalities, B or 1, 1 to 3, D]: of da and da * xhat if ``need_affine``, and of dy * f
    if there is f and its gate is not per token. Unless ``per_sample``, they are summed over the
    batch as well.
    """
    y = args.y
    is_per_token = has_vector_per_token([*args.gate, *args.scale])
    acc = accumulator(y)
    has_dgate = args.f is not None and is_per_token
    has_dscale = args.need_scale and is_per_token
    n_sums = 2 * args.need_affine + (args.f is not None and not is_per_token)
    n_modalities = 1 + (args.text_length > 0)
    n_samples = len(y) if args.per_sample else 1
    return (
        y.new_empty(y.shape),
        y.new_empty(y.shape, dtype=args.f_dtype) if args.need_f else absent(y),
        y.new_empty(y.shape, dtype=args.entries_dtype) if args.need_entries else absent(y),
        y.new_empty((), dtype=acc) if args.cache_gate is not None else absent(y),
        y.new_empty(y.shape, dtype=widest_dtype(v.dtype for v in args.gate or [y]))
        if has_dgate
        else absent(y),
        y.new_empty(y.shape, dtype=widest_dtype(v.dtype for v in args.scale))
        if has_dscale
        else absent(y),
        y.new_empty((n_modalities, n_samples, n_sums, y.shape[2]), dtype=acc)
        if n_sums
        else absent(y),
    )


def widest_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """A dtype that holds what any of them does, for a gradient that several tensors share."""
    return reduce(torch.promote_types, dtypes)
