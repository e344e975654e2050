"""A memory-bound case with real tensors, compared with eager PyTorch in fp64 on the same inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bench.measure.case import TOLERANCE, Function, as_tuple, relative_error, worst
from bench.memory.registry import Inputs, MemoryCase
from vidgen.ops import Ops


@dataclass(frozen=True, eq=False)
class MemoryCall:
    spec: MemoryCase
    dtype: torch.dtype
    device: torch.device
    inputs: Inputs

    @classmethod
    def make(cls, spec: MemoryCase, dtype: torch.dtype, device: torch.device) -> MemoryCall:
        return cls(spec, dtype, device, spec.inputs(dtype, device))

    @property
    def names(self) -> list[str]:
        """The inputs that are differentiated."""
        return [name for name, x in self.inputs.items() if x.requires_grad]

    @property
    def leaves(self) -> list[Tensor]:
        return [self.inputs[name].detach() for name in self.names]

    def function(self, ops: Ops) -> Function:
        """The call as a function of the leaves."""

        def call(*leaves: Tensor) -> tuple[Tensor, ...]:
            named = dict(zip(self.names, leaves, strict=True))
            return self.spec.call(ops, {**self.inputs, **named})

        return call

    def upstream(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        return [torch.randn_like(x) for x in outputs]

    def allowed(self, backward: bool) -> float:
        return TOLERANCE[self.dtype]

    @cached_property
    def reference(self) -> Reference:
        return Reference.of(self)

    def disagreement(self, function: Function, backward: bool) -> float:
        leaves = [x.requires_grad_(backward) for x in self.leaves]
        outputs = as_tuple(function(*leaves))
        # eager code has no running sum to return
        for x, expected in zip(outputs, self.reference.outputs, strict=False):
            if x.shape != expected.shape:
                raise ValueError(f"expected shape {list(expected.shape)}, got {list(x.shape)}")
        found = self.spec.compared(self.inputs, [x.detach() for x in outputs])
        expected = self.spec.compared(self.reference.inputs, self.reference.outputs)
        errors = [relative_error(x, y) for x, y in zip(found, expected, strict=False)]
        if backward:
            upstream = zip(self.reference.upstream, outputs, strict=False)
            grads = torch.autograd.grad(
                outputs, leaves, [g.to(x.dtype) for g, x in upstream], allow_unused=True
            )
            for name, x, y in zip(self.names, grads, self.reference.grads, strict=True):
                if x is None and self.spec.may_lack(name):
                    continue
                errors.append(relative_error(torch.zeros_like(y) if x is None else x, y))
        return worst(errors)


@dataclass(frozen=True, eq=False)
class Reference:
    """Inputs, outputs, incoming and outgoing gradients, all fp64."""

    inputs: Inputs
    outputs: list[Tensor]
    upstream: list[Tensor]
    grads: list[Tensor]

    @classmethod
    def of(cls, call: MemoryCall) -> Reference:
        inputs = {
            name: x.detach().double().requires_grad_(x.requires_grad)
            if x.is_floating_point()
            else x
            for name, x in call.inputs.items()
        }
        outputs = as_tuple(call.spec.define(inputs))
        rng = torch.Generator(call.device).manual_seed(1)
        # Noise plus the output itself, so that no sum over many tokens nearly cancels.
        upstream = [
            x.detach() + torch.randn(x.shape, generator=rng, device=x.device, dtype=x.dtype)
            for x in outputs
        ]
        # Rounded to the dtype in which every provider gets it.
        upstream = call.spec.upstream([g.to(call.dtype).double() for g in upstream])
        leaves = [inputs[name] for name in call.names]
        grads = torch.autograd.grad(outputs, leaves, upstream, materialize_grads=True)
        return cls(
            {name: x.detach() for name, x in inputs.items()},
            [x.detach() for x in outputs],
            upstream,
            list(grads),
        )
