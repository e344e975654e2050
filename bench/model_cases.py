"""Steps of Pyramid Flow's transformers, and the reference that every provider is held against.

A step of training makes the columns of the pyramid, runs the model on all of them packed, and
returns the loss; one of sampling returns the velocity of the frame that is being made, for a
prompt and for the empty one. What is differentiated are all parameters of the model.

The reference is eager PyTorch with the same weights and inputs, in fp64, or in fp32 on a GPU, where
a model of full size would not fit otherwise. It keeps no activations but the blocks' inputs.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from bench.cases import TOLERANCE, Function, as_tuple, relative_error, worst
from vidgen.ops import EAGER, Ops
from vidgen.pyramid_flow.config import FluxConfig
from vidgen.pyramid_flow.example import (
    LATENTS,
    SamplingExample,
    TrainingExample,
    example_config,
    example_model,
    sampling_example,
    training_example,
)
from vidgen.pyramid_flow.history import training_units
from vidgen.pyramid_flow.training import TrainingConfig, column_tokens, training_step
from vidgen.pyramid_flow.transformer import PyramidTransformer

ModelName = Literal["flux", "mmdit"]
MODELS: tuple[ModelName, ...] = ("flux", "mmdit")
Example = TrainingExample | SamplingExample

COMPARED_GRADIENTS = 48
REDUCED, TOY = (4, 1), (1, 1)  # heads, and layers of a kind


@dataclass(frozen=True)
class ModelStep:
    """A step of one of the two transformers, as released or with less width and depth."""

    model: ModelName
    size: str  # of `LATENTS`
    less: tuple[int, int] | tuple[()] = ()

    @property
    def name(self) -> str:
        raise NotImplementedError

    @property
    def title(self) -> str:
        return "Pyramid Flow miniFLUX" if self.model == "flux" else "Pyramid Flow SD3"

    @property
    def n_tokens(self) -> int:
        """Video tokens that the model is given, history included."""
        raise NotImplementedError

    def example(self, model: PyramidTransformer) -> Example:
        raise NotImplementedError


@dataclass(frozen=True)
class TrainingStep(ModelStep):
    n_frames: int = 16

    @property
    def name(self) -> str:
        return f"{'cpu_' if self.less == REDUCED else ''}{self.model}_train_{self.size}"

    @property
    def n_tokens(self) -> int:
        config, sync_group = TrainingConfig(), min(8, self.n_frames)
        units = training_units(config.n_stages, self.n_frames, step=1, sync_group=sync_group)
        counts = (
            column_tokens(*LATENTS[self.size], stage, units[stage], config)
            for stage in config.stages
        )
        return sum(counts)

    def example(self, model: PyramidTransformer) -> TrainingExample:
        return training_example(model, size=self.size, n_frames=self.n_frames)


@dataclass(frozen=True)
class SamplingStep(ModelStep):
    unit: int = 15
    stage: int = 2

    @property
    def name(self) -> str:
        return f"{self.model}_{self.size}_u{self.unit}_s{self.stage}"

    @property
    def n_tokens(self) -> int:
        size = LATENTS[self.size]
        return 2 * column_tokens(*size, self.stage, self.unit + 1, TrainingConfig())

    def example(self, model: PyramidTransformer) -> SamplingExample:
        return sampling_example(model, size=self.size, unit=self.unit, stage=self.stage, rows=2)


def _real() -> list[ModelStep]:
    """The most telling first: a run that is cut short has measured those."""
    found: list[ModelStep] = [TrainingStep(m, s) for s in ("384p", "768p") for m in MODELS]
    for size in ("768p", "384p"):
        found += [SamplingStep(m, size, stage=stage) for m in MODELS for stage in (2, 1, 0)]
    return found


STEPS: dict[str, tuple[ModelStep, ...]] = {
    "real": tuple(_real()),
    "reduced": tuple(TrainingStep(m, "384p", REDUCED) for m in MODELS),
    "toy": (
        *(TrainingStep(m, "toy", TOY, n_frames=3) for m in MODELS),
        *(SamplingStep(m, "toy", TOY, unit=2, stage=1) for m in MODELS),
    ),
}


class Step(nn.Module):
    """A model and what it is run on, without arguments."""

    def __init__(self, model: PyramidTransformer, run: Callable[[PyramidTransformer], Tensor]):
        super().__init__()
        self.model, self.run = model, run

    def forward(self) -> Tensor:
        return self.run(self.model)


class Reference(NamedTuple):
    output: Tensor
    upstream: Tensor
    grads: dict[int, Tensor]  # of some leaves, by their index


@dataclass(frozen=True, eq=False)
class ModelCase:
    """All providers run `model`, with other ops or compiled, and the same parameters."""

    spec: ModelStep
    dtype: torch.dtype
    device: torch.device
    model: PyramidTransformer  # with eager ops
    example: Example
    # known once asked for, by whether there is a backward
    references: dict[bool, Reference] = field(default_factory=dict)
    eager_errors: dict[bool, float] = field(default_factory=dict)

    @classmethod
    def make(cls, spec: ModelStep, dtype: torch.dtype, device: torch.device) -> ModelCase:
        config = example_config(spec.model, *spec.less)
        model = example_model(config, EAGER, device=device, dtype=dtype)
        return cls(spec, dtype, device, model, spec.example(model))

    @property
    def leaves(self) -> list[Tensor]:
        return [parameter.detach() for parameter in self.model.parameters()]

    def function(self, ops: Ops, change: Callable[[nn.Module], Any] | None = None) -> Function:
        """The step as a function of the leaves; its blocks are what ``change`` makes of them."""
        twin = copy.copy(self.model)  # the same modules
        twin.ops = ops
        if change is not None:
            twin.__dict__["_modules"] = dict(self.model._modules)
            for name, child in self.model.named_children():
                if isinstance(child, nn.ModuleList):
                    setattr(twin, name, nn.ModuleList(map(change, child)))
        step = Step(twin, self.example)
        names = [name for name, _ in step.named_parameters()]
        return lambda *leaves: functional_call(step, dict(zip(names, leaves, strict=True)), ())

    def upstream(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        return [_upstream(x) for x in outputs]

    def allowed(self, backward: bool) -> float:
        """At least twice what eager PyTorch is off: errors grow with the number of layers."""
        if backward not in self.eager_errors:
            self.eager_errors[backward] = self.disagreement(self.function(EAGER), backward)
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
                errors.append(relative_error(grad, expected))
        return worst(errors)

    def _refer(self, backward: bool) -> Reference:
        wide = torch.float64 if self.device.type == "cpu" else torch.float32
        wide = torch.promote_types(self.dtype, wide)
        model = copy.deepcopy(self.model).to(wide)
        model.config = _checkpointing(model.config)
        leaves = list(model.parameters())
        n_compared = min(len(leaves), COMPARED_GRADIENTS)
        compared = random.Random(0).sample(range(len(leaves)), n_compared) if backward else []
        for i, parameter in enumerate(leaves):
            parameter.requires_grad_(i in compared)
        output = self._widened(wide)(model)
        upstream = _upstream(output).to(self.dtype).to(wide)
        grads = []
        if backward:
            wanted = [leaves[i] for i in compared]
            grads = torch.autograd.grad(output, wanted, upstream, materialize_grads=True)
        return Reference(output.detach(), upstream, dict(zip(compared, grads, strict=True)))

    def _widened(self, dtype: torch.dtype) -> Callable[[PyramidTransformer], Tensor]:
        """The example with the very numbers that the model is run on here.

        Its columns too: a timestep that is rounded to 16 bits is another time.
        """

        def widen(x: Any) -> Any:
            return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

        example = self.example
        if isinstance(example, SamplingExample):
            return pytree.tree_map(widen, example)
        columns, conditions = pytree.tree_map(widen, (example.columns(EAGER), example.conditions))
        return lambda model: training_step(model, columns, conditions).loss


def _upstream(output: Tensor) -> Tensor:
    """1 for a loss, else noise."""
    if not output.ndim:
        return torch.ones_like(output)
    generator = torch.Generator(output.device).manual_seed(1)
    noise = torch.empty_like(output)
    return noise.normal_(generator=generator)


def _checkpointing(config: Any) -> Any:
    """All blocks keep only their inputs: miniFLUX counts from the first, MM-DiT from the last."""
    ratio = 1.0 if isinstance(config, FluxConfig) else 0.0
    return replace(config, use_gradient_checkpointing=True, gradient_checkpointing_ratio=ratio)
