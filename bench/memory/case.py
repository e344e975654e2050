"""A call of a memory-bound operator at a shape, and the bytes it must move.

    inputs(dtype, device, seed)   its tensors by name; those that require grad are differentiated
    call(ops, inputs)             one call of `vidgen.ops.Ops`, a tuple of differentiable outputs
    floor(dtype)                  bytes that must move once, forward and backward

Floors count distinct tensors read and written. Their unit is one tensor ``[B, T, D]``, or one
latent at its higher resolution. Vectors of a modulation, weights and positions are left out: they
are below 1 % at the real shapes. The forward is that of inference, which keeps nothing for a
backward. A backward reads the least that the formula needs; a gradient that equals the incoming one
is neither read nor written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from bench.measure.case import as_tuple
from vidgen.ops import EAGER, Ops
from vidgen.shapes import LatentShape, TokenShape

Inputs = dict[str, Tensor]


class Floor(NamedTuple):
    """The least that a forward and a backward move, in units or in bytes."""

    fwd: float
    bwd: float

    def of(self, direction: str) -> float:
        return sum(self) if direction == "fwd+bwd" else getattr(self, direction)


class Draw(NamedTuple):
    """Draws the tensors of a case: normal, and they require grad."""

    dtype: torch.dtype
    device: torch.device | str
    generator: torch.Generator

    def __call__(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.dtype
        x = torch.randn(size, generator=self.generator, device=self.device, dtype=dtype)
        return x.requires_grad_()

    def rows(self, shape: TokenShape, names: str, dtype: torch.dtype | None = None) -> Inputs:
        size = shape.batch, shape.tokens, shape.hidden
        return {name: self(*size, dtype=dtype) for name in names.split()}

    def vectors(self, length: int, names: str) -> Inputs:
        return {name: self(length) for name in names.split()}

    def modulation(self, shape: TokenShape, names: str, per_token: bool = False) -> Inputs:
        """Vectors as the models have them: pieces of one projection, so they have strides."""
        chosen = names.split()
        size = (shape.batch, shape.tokens) if per_token else (shape.batch,)
        pieces = self(*size, len(chosen) * shape.hidden).detach().chunk(len(chosen), dim=-1)
        return {name: x.requires_grad_() for name, x in zip(chosen, pieces, strict=True)}


@dataclass(frozen=True)
class MemoryCase:
    """One operator at one shape. Subclasses say which tensors it takes and what it must move."""

    shape: TokenShape | LatentShape
    op: ClassVar[str]  # field of `Ops`
    options: ClassVar[dict[str, Any]] = {}  # arguments of the call that are no tensors
    moves: ClassVar[Floor]  # in units
    liger: ClassVar[str | None] = None  # function of liger-kernel that does the same job
    draws_noise: ClassVar[bool] = False

    @property
    def variant(self) -> str:
        """The operator, or what is done with it."""
        return self.op

    @property
    def name(self) -> str:
        return f"{self.variant}-{self.shape.name}"

    def inputs(self, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> Inputs:
        return self.tensors(Draw(dtype, device, torch.Generator(device).manual_seed(seed)))

    def floor(self, dtype: torch.dtype) -> Floor:
        unit = self.shape.numel * dtype.itemsize
        fwd, bwd = self.units(sum_dtype(dtype).itemsize / dtype.itemsize)
        return Floor(fwd * unit, bwd * unit)

    def tensors(self, draw: Draw) -> Inputs:
        raise NotImplementedError

    def call(self, ops: Ops, inputs: Inputs) -> tuple[Tensor, ...]:
        return as_tuple(getattr(ops, self.op)(**inputs, **self.options))

    def units(self, wide: float) -> Floor:
        """The floor in units; a tensor in `sum_dtype` counts ``wide``."""
        return self.moves

    def define(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """The reference that implementations are compared with, on fp64 inputs."""
        return self.call(EAGER, inputs)

    def upstream(self, drawn: list[Tensor]) -> list[Tensor]:
        """The gradient of each output; ``drawn`` are random ones."""
        return drawn

    def may_lack(self, name: str) -> bool:
        """Whether an implementation need not have the gradient of this input."""
        return False

    def compared(self, inputs: Inputs, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """What of the outputs must agree between implementations."""
        return outputs


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of running sums and clean predictions, which are at least fp32."""
    return torch.promote_types(dtype, torch.float32)
