"""The five suites: what each measures, with which providers.

Run by path, it lists the providers and why this machine lacks some; `vidgen info` shows that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench.attention.cases import AttentionCase
from bench.attention.curves import POINTS, make_case
from bench.attention.providers import PROVIDERS as ATTENTION_PROVIDERS
from bench.measure.provider import Provider
from bench.memory.calls import MemoryCall
from bench.memory.providers import PROVIDERS as MEMORY_PROVIDERS
from bench.memory.registry import CASES
from bench.models.calls import ModelCase
from bench.models.providers import PROVIDERS as MODEL_PROVIDERS
from bench.models.registry import STEPS, VIDEOS
from vidgen.shapes import SETS, Direction


def directions(spec: Any) -> tuple[Direction, ...]:
    """What is measured of a spec; a step of sampling has no backward.

    ``bwd`` and ``fwd+bwd`` come from the same samples, so they follow each other.
    """
    return getattr(spec, "directions", ("fwd", "bwd", "fwd+bwd"))


@dataclass(frozen=True, eq=False)
class Suite:
    """Everything that one ``bench_<name>.py`` runs. A spec is a shape, or an operator at one."""

    name: str
    sets: dict[str, tuple[Any, ...]]  # specs with a `name`
    providers: dict[str, Provider]
    make: Callable[[Any, torch.dtype, torch.device], Any]  # makes a `Case` of a spec
    cpu_seconds: float  # per provider, direction and spec
    longest_seconds: float = 60  # for a spec and direction on a GPU, with compiling
    graphs: bool = True  # a GPU replays CUDA graphs

    @property
    def names(self) -> list[str]:
        return [spec.name for specs in self.sets.values() for spec in specs]

    @property
    def compiles(self) -> bool:
        """Whether there is anything to compile before a benchmark."""
        return any(provider.compiles for provider in self.providers.values())

    def find(self, name: str) -> Any:
        return next(s for specs in self.sets.values() for s in specs if s.name == name)


ATTENTION = Suite("attention", SETS, ATTENTION_PROVIDERS, AttentionCase.make, 1.0)
MEMORY = Suite("memory", CASES, MEMORY_PROVIDERS, MemoryCall.make, 0.2)
# A graph of a step would keep its activations, and each provider has one.
MODELS = Suite("models", STEPS, MODEL_PROVIDERS, ModelCase.make, 0.5, 150, graphs=False)
SAMPLERS = Suite("samplers", VIDEOS, MODEL_PROVIDERS, ModelCase.make, 0.5, 250, graphs=False)
# A CPU would spend minutes on compiling FlexAttention for every size.
SCALING_PROVIDERS = {
    name: replace(provider, default_on=("cuda",)) if name == "flex" else provider
    for name, provider in ATTENTION_PROVIDERS.items()
}
SCALING = Suite("scaling", POINTS, SCALING_PROVIDERS, make_case, 0.3)
SUITES = {suite.name: suite for suite in (ATTENTION, MEMORY, MODELS, SAMPLERS, SCALING)}


if __name__ == "__main__":
    this_device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for suite in SUITES.values():
        print(f"  {suite.name}")
        for provider in suite.providers.values():
            reason = provider.missing(this_device)
            print(f"    {provider.name:22} {provider.summary}{f' [{reason}]' if reason else ''}")
