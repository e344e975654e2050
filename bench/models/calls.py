"""Steps of models with real tensors, and the reference that every provider is compared with.

All parameters of the model are differentiated. The reference is eager PyTorch with the same weights
and inputs, in the order of the released code: in fp64, or on a GPU in fp32, as a model of full size
would not fit otherwise. Of the activations it keeps the inputs of the blocks only.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bench.measure.case import TOLERANCE, Function, as_tuple, relative_error, worst
from bench.models.case import ForwardChange, ModelStep, Run, Step, Way, keeping_inputs, twin
from vidgen.ops import EAGER, Ops

COMPARED_GRADIENTS = 48


class Reference(NamedTuple):
    output: Tensor
    upstream: Tensor
    grads: dict[int, Tensor]  # of some leaves, by their index

    def gradient_error(self, actual: Tensor, expected: Tensor) -> float:
        """The error in units of the largest value of this gradient.

        A gradient that is 0 but for rounding is measured in units of the largest of all. The bias
        of the keys has such a one: attention is the same without it.
        """
        largest = max(float(grad.abs().max()) for grad in self.grads.values())
        own = float(expected.abs().max())
        if 0 < own < torch.finfo(expected.dtype).eps ** 0.5 * largest:
            return float((actual.double() - expected).abs().max()) / largest
        return relative_error(actual, expected)


class ModelFunction:
    """A model and its inputs, as a function of the model's parameters."""

    def __init__(self, model: nn.Module, run: Run) -> None:
        self.model, self.step = model, Step(model, run)
        self.names = [name for name, _ in self.step.named_parameters()]

    def __call__(self, *leaves: Tensor) -> Tensor:
        return functional_call(self.step, dict(zip(self.names, leaves, strict=True)), ())


@dataclass(frozen=True, eq=False)
class ModelCase:
    """All providers run `model` with its weights: with other ops, in another way, or compiled."""

    spec: ModelStep
    dtype: torch.dtype
    device: torch.device
    model: nn.Module  # with eager ops
    example: Any
    # filled when first needed; the key says whether there is a backward
    references: dict[bool, Reference] = field(default_factory=dict)
    eager_errors: dict[bool, float] = field(default_factory=dict)

    @classmethod
    def make(cls, spec: ModelStep, dtype: torch.dtype, device: torch.device) -> ModelCase:
        model = spec.model(device, dtype)
        return cls(spec, dtype, device, model, spec.example(model))

    @property
    def leaves(self) -> list[Tensor]:
        return [parameter.detach() for parameter in self.model.parameters()]

    def function(self, ops: Ops, way: Way, change: ForwardChange | None = None) -> Function:
        """The step as a function of the leaves; ``change`` is made to the forward of its blocks."""
        model = twin(self.model, ops, change)
        with torch.no_grad():
            return ModelFunction(model, self.spec.prepare(self.example, model, way))

    def upstream(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        return [_upstream(x) for x in outputs]

    def allowed(self, backward: bool) -> float:
        """At least twice the error of eager PyTorch, as errors grow with the number of layers."""
        if backward not in self.eager_errors:
            function = self.function(EAGER, "released")
            self.eager_errors[backward] = self.disagreement(function, backward)
        return max(TOLERANCE[self.dtype], 2 * self.eager_errors[backward])

    def disagreement(self, function: Function, backward: bool) -> float:
        if backward not in self.references:
            self.references[backward] = self._refer(backward)
        reference = self.references[backward]
        leaves = [x.requires_grad_(backward) for x in self.leaves]
        with torch.set_grad_enabled(backward):
            (output,) = as_tuple(function(*leaves))
        errors = [relative_error(output.detach(), reference.output)]
        if backward:
            upstream = reference.upstream.to(output.dtype)
            grads = torch.autograd.grad(output, leaves, upstream, allow_unused=True)
            for i, expected in reference.grads.items():
                grad = torch.zeros_like(expected) if grads[i] is None else grads[i]
                errors.append(reference.gradient_error(grad, expected))
        return worst(errors)

    def _refer(self, backward: bool) -> Reference:
        wide = torch.float64 if self.device.type == "cpu" else torch.float32
        wide = torch.promote_types(self.dtype, wide)
        model = copy.deepcopy(self.model).to(wide)
        leaves = list(model.parameters())
        n_compared = min(len(leaves), COMPARED_GRADIENTS)
        compared = random.Random(0).sample(range(len(leaves)), n_compared) if backward else []
        for i, parameter in enumerate(leaves):
            parameter.requires_grad_(i in compared)
        model = twin(model, EAGER, keeping_inputs if backward else None)
        example = self.spec.widened(self.example, wide)
        with torch.set_grad_enabled(backward):
            output = self.spec.prepare(example, model, "released")(model)
        upstream = _upstream(output).to(self.dtype).to(wide)
        grads = []
        if backward:
            wanted = [leaves[i] for i in compared]
            grads = torch.autograd.grad(output, wanted, upstream, materialize_grads=True)
        return Reference(output.detach(), upstream, dict(zip(compared, grads, strict=True)))


def _upstream(output: Tensor) -> Tensor:
    """1 for a loss, else noise."""
    if not output.ndim:
        return torch.ones_like(output)
    generator = torch.Generator(output.device).manual_seed(1)
    noise = torch.empty_like(output)
    return noise.normal_(generator=generator)
