"""What the benchmarks know of a step of a model, or of a whole sampler, whichever model it is of.

A step is a model, built with eager ops and random weights, and an example to run it on. Where the
released code takes another way to the same result than our models do, an example knows both, and
so may it know a way by a cache.
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
Run = Callable[[Any], Tensor]  # of the model

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
        """The model's."""

    @property
    @abstractmethod
    def work(self) -> dict[str, float]:
        """Of a call, by the name of its rate: per second, what is counted in seconds apart."""

    @property
    def directions(self) -> tuple[Direction, ...]:
        return TRAINING

    @property
    def measured_share(self) -> float:
        """How much of the work is run; times of the whole are projected from it."""
        return 1.0

    @property
    def has_cache(self) -> bool:
        """Whether there is a way "cached"."""
        return False

    @abstractmethod
    def model(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """With eager ops."""

    @abstractmethod
    def example(self, model: Any) -> Any:
        """Inputs in the model's dtype and on its device."""

    def prepare(self, example: Any, model: nn.Module, way: Way) -> Run:
        """What is timed; all that lasts for many calls is done here, by ``model``."""
        return example

    def widened(self, example: Any, dtype: torch.dtype) -> Any:
        """The example with the very same numbers in ``dtype``."""

        def widen(x: Any) -> Any:
            return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

        return pytree.tree_map(widen, example)


class TokenStep(ModelStep):
    """Counted in video tokens."""

    @property
    @abstractmethod
    def n_tokens(self) -> int:
        """Video tokens that the model is given, history and both branches of guidance included."""

    @property
    def work(self) -> dict[str, float]:
        return {"tokens_per_s": self.n_tokens}


class Sampler(ModelStep):
    """Latents of a video from noise, without text encoder and VAE; an even share of the steps."""

    @property
    def work(self) -> dict[str, float]:
        return {"videos_per_hour": 3600 * self.measured_share}

    @property
    def directions(self) -> tuple[Direction, ...]:
        return SAMPLING


class Step(nn.Module):
    """A model and what it is run on, without arguments."""

    def __init__(self, model: nn.Module, run: Run) -> None:
        super().__init__()
        self.model, self.run = model, run

    def forward(self) -> Tensor:
        return self.run(self.model)


ForwardChange = Callable[[Callable[..., Any]], Callable[..., Any]]


def twin(model: nn.Module, ops: Ops, change: ForwardChange | None = None) -> nn.Module:
    """The model with other ops and the same parameters; ``change`` is made to its blocks' forward.

    Blocks are what lies in a ModuleList of the model or of its parts. They keep their classes, by
    which models know them.
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
    """A block whose backward runs it again: of full size nothing else would fit in fp32."""
    return partial(checkpoint, forward, use_reentrant=False)
