"""A call of a memory-bound operator at a shape, and what it must move.

    inputs(dtype, device, seed)   its tensors by name; those that require grad are differentiated
    call(ops, inputs)             one call of `vidgen.ops.Ops`, a tuple of differentiable outputs
    floor(dtype)                  bytes that must move once, forward and backward

Floors count distinct tensors read and written, in units u of one tensor ``[B, T, D]`` (of one
latent at its higher resolution). Vectors of a modulation, weights and positions are left out: they
are below 1 % at the real shapes. Forward is that of inference, which keeps nothing for a backward.
A backward reads the least that the formula needs; a gradient that is the incoming one is neither
read nor written for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from vidgen.ops import EAGER, Ops
from vidgen.shapes import LatentShape, TokenShape

Inputs = dict[str, Tensor]


class Floor(NamedTuple):
    """Units, or bytes, that one pass moves at least."""

    fwd: float
    bwd: float

    def of(self, direction: str) -> float:
        return sum(self) if direction == "fwd+bwd" else getattr(self, direction)


class Draw(NamedTuple):
    """Normal tensors of a case, that require grad."""

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
        """Vectors as the models have them: pieces of one projection, so with strides."""
        chosen = names.split()
        size = (shape.batch, shape.tokens) if per_token else (shape.batch,)
        pieces = self(*size, len(chosen) * shape.hidden).detach().chunk(len(chosen), dim=-1)
        return {name: x.requires_grad_() for name, x in zip(chosen, pieces, strict=True)}


@dataclass(frozen=True)
class MemoryCase:
    """One operator at one shape. Subclasses fill in the tensors, the call and the units."""

    shape: TokenShape | LatentShape
    op: ClassVar[str]  # field of `Ops`
    kind: ClassVar[str] = ""  # what else is done with the operator
    liger: ClassVar[str | None] = None  # function of liger-kernel that does the same job
    draws_noise: ClassVar[bool] = False

    @property
    def variant(self) -> str:
        return self.kind or self.op

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
        raise NotImplementedError

    def units(self, wide: float) -> Floor:
        """The floor in units; ``wide`` is what a tensor in `sum_dtype` takes."""
        raise NotImplementedError

    def define(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """What the call means, on fp64 inputs."""
        return self.call(EAGER, inputs)

    def upstream(self, drawn: list[Tensor]) -> list[Tensor]:
        """A gradient for each output, of those drawn."""
        return drawn

    def may_lack(self, name: str) -> bool:
        """Whether an implementation need not have the gradient of this input."""
        return False

    def compared(self, inputs: Inputs, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """What of the outputs must agree between implementations."""
        return outputs


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of what is kept wider than the rest: running sums, clean predictions."""
    return torch.promote_types(dtype, torch.float32)
