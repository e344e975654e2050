"""What the operators behind `post_norm_residual` take, and memory for their results."""

from typing import NamedTuple

from torch import Tensor

from .operands import absent, accumulator


class Forward(NamedTuple):
    x: Tensor  # [B, T, D]
    f: Tensor  # [B, T, D]
    gate: Tensor | None  # [B, 1, D], or [B, T, D] with a gate for each token
    weight: Tensor | None  # [D]
    bias: Tensor | None  # [D]
    norm: str  # "layer" or "rms"
    eps: float


class Backward(NamedTuple):
    do: Tensor
    f: Tensor
    stats: Tensor
    gate: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    norm: str
    need_f: bool
    need_gate: bool  # never for a gate that tokens share: its gradient follows from the sums
    need_sums: bool


def empty_fwd(args: Forward) -> tuple[Tensor, Tensor]:
    """out, and the mean and rstd of the rows of f [2, B, T]."""
    x = args.x
    return x.new_empty(x.shape), x.new_empty((2, *x.shape[:2]), dtype=accumulator(x, args.f))


def empty_bwd(args: Backward) -> tuple[Tensor, Tensor, Tensor]:
    """df, dgate, and the sums of dn and dn * xhat over the rows of each sample [B, 2, D]."""
    f, gate = args.f, args.gate
    dgate_dtype = f.dtype if gate is None else gate.dtype
    shape_of_sums = len(f), 2, f.shape[2]
    return (
        f.new_empty(f.shape) if args.need_f else absent(f),
        f.new_empty(f.shape, dtype=dgate_dtype) if args.need_gate else absent(f),
        f.new_empty(shape_of_sums, dtype=accumulator(args.do, f)) if args.need_sums else absent(f),
    )


def is_per_token(gate: Tensor | None) -> bool:
    return gate is not None and gate.shape[1] != 1
