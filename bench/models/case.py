"""A step of a model, or a whole sampler, as the benchmarks see it, whichever model it is of.

A step is a model, built with eager ops and random weights, and an example to run it on. Where our
models come to the same result in another way than the released code, the example knows both ways;
some know a third, with a cache.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from vidgen.ops import Ops
from vidgen.shapes import Direction

Way = Literal["ours", "released", "cached"]
Run = Callable[[Any], Tensor]  # takes the model

TRAINING: tuple[Direction, ...] = ("fwd", "bwd", "fwd+bwd")
SAMPLING: tuple[Direction, ...] = ("fwd",)


@dataclass(frozen=True)
class ModelStep(ABC):
    """One spec of the suite of models."""

    @property
    @abstractmethod
    def name(self) -> str: ...

    @property
    @abstractmethod
    def title(self) -> str:
        """The name of the model, as reports show it."""

    @property
    @abstractmethod
    def work(self) -> dict[str, float]:
        """The work of a call, by the name of its rate (this work over the seconds taken)."""

    @property
    def directions(self) -> tuple[Direction, ...]:
        return TRAINING

    @property
    def measured_share(self) -> float:
        """The share of the work that is run; the time of the whole is projected from it."""
        return 1.0

    @property
    def has_cache(self) -> bool:
        """Whether it can run in the way "cached"."""
        return False

    @abstractmethod
    def model(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The model, with eager ops."""

    @abstractmethod
    def example(self, model: Any) -> Any:
        """Inputs in the model's dtype and on its device."""

    def prepare(self, example: Any, model: nn.Module, way: Way) -> Run:
        """The call that is timed. Work that many calls share is done here, with ``model``."""
        return example

    def widened(self, example: Any, dtype: torch.dtype) -> Any:
        """The example with the very same numbers in ``dtype``."""

        def widen(x: Any) -> Any:
            return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

        return pytree.tree_map(widen, example)


class TokenStep(ModelStep):
    """A step whose work is counted in video tokens."""

    @property
    @abstractmethod
    def n_tokens(self) -> int:
        """Video tokens given to the model, with history and both branches of guidance."""

    @property
    def work(self) -> dict[str, float]:
        return {"tokens_per_s": self.n_tokens}


class Sampler(ModelStep):
    """From noise to latents, without text encoder and VAE; of the steps an even share is run."""

    @property
    def work(self) -> dict[str, float]:
        return {"videos_per_hour": 3600 * self.measured_share}

    @property
    def directions(self) -> tuple[Direction, ...]:
        return SAMPLING


class Step(nn.Module):
    """A model and its inputs, as a module without arguments."""

    def __init__(self, model: nn.Module, run: Run) -> None:
        super().__init__()
        self.model, self.run = model, run

    def forward(self) -> Tensor:
        return self.run(self.model)


ForwardChange = Callable[[Callable[..., Any]], Callable[..., Any]]


def twin(model: nn.Module, ops: Ops, change: ForwardChange | None = None) -> nn.Module:
    """The model with other ops and the same parameters; ``change`` wraps the forward of its blocks.

    Blocks are the members of a ModuleList of the model or of its parts. They keep their classes,
    which models look at.
    """
    made = copy.copy(model)
    if hasattr(made, "ops"):
        made.ops = ops  # type: ignore[assignment]
    children = {
        name: child if child is None else _twin_child(child, ops, change)
        for name, child in model._modules.items()
    }
    made.__dict__["_modules"] = children
    return made


def _twin_child(child: nn.Module, ops: Ops, change: ForwardChange | None) -> nn.Module:
    if not isinstance(child, nn.ModuleList):
        return twin(child, ops, change)
    if change is None:
        return child
    made = copy.copy(child)
    blocks = {name: _changed(block, change) for name, block in child._modules.items()}
    made.__dict__["_modules"] = blocks
    return made


def _changed(block: nn.Module | None, change: ForwardChange) -> nn.Module:
    assert block is not None
    made = copy.copy(block)
    made.forward = change(block.forward)
    return made


def keeping_inputs(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A block that runs again in its backward: in fp32, a full model would not fit otherwise."""
    return partial(checkpoint, forward, use_reentrant=False)
