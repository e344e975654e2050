"""What the operators behind `post_norm_adaln` take, and memory for their results."""

from typing import NamedTuple

import torch
from torch import Tensor

from .operands import absent, accumulator


class Forward(NamedTuple):
    x: Tensor  # as f, gate, scale and shift [B, T, D]
    f: Tensor
    gate: Tensor | None
    scale: Tensor
    shift: Tensor
    weight: Tensor | None  # [D]
    bias: Tensor | None  # [D]
    eps: float
    next_eps: float
    a_dtype: torch.dtype


class Backward(NamedTuple):
    dout: Tensor | None
    da: Tensor | None
    out: Tensor
    f: Tensor
    stats: Tensor
    gate: Tensor | None
    scale: Tensor
    weight: Tensor | None
    bias: Tensor | None
    need_x: bool
    need_f: bool
    need_gate: bool
    need_scale: bool
    need_sums: bool


def empty_fwd(args: Forward) -> tuple[Tensor, Tensor, Tensor]:
    """out, a, and the mean and rstd of the rows of f, then of out [4, B, T]."""
    x = args.x
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape, dtype=args.a_dtype),
        x.new_empty((4, *x.shape[:2]), dtype=accumulator(x, args.f)),
    )


def empty_bwd(args: Backward) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, df, dgate, dscale, and the sums of dn and dn * xhat over all rows [2, D]."""
    out, f, gate = args.out, args.f, args.gate
    dgate_dtype = f.dtype if gate is None else gate.dtype
    acc = accumulator(out, f)
    return (
        out.new_empty(out.shape) if args.need_x else absent(f),
        f.new_empty(f.shape) if args.need_f else absent(f),
        f.new_empty(f.shape, dtype=dgate_dtype) if args.need_gate else absent(f),
        f.new_empty(f.shape, dtype=args.scale.dtype) if args.need_scale else absent(f),
        f.new_empty((2, f.shape[2]), dtype=acc) if args.need_sums else absent(f),
    )
