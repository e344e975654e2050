"""Models: our kernels against eager PyTorch and its compiler, with the same parameters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import config as dynamo_config

from bench.measure.case import Function
from bench.measure.provider import Provider, as_table, needs_compiler
from bench.models.calls import ModelCase
from vidgen import eager
from vidgen.ops import EAGER, FUSED

COMPILED_VARIANTS = 32  # of a function; more than any block has, as further ones run uncompiled
SEGMENT = torch.compile(eager.segment, dynamic=False)


class CompiledWindow(eager.CacheWindow):
    """RepVideo's cache, compiled by the number of outputs that are mixed, not by the layer."""

    @torch.compiler.disable
    def segment(
        self, layer: int, x: Tensor, f: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        n, older = self._enter(layer, x)
        h, a, _, y = SEGMENT(x, f, None, self.gates[layer], n, older=older, **options)
        assert y is not None
        self._outputs = [*older, y]
        return h, a


# If attention were traced, every block would build the dense mask anew. RepVideo's cache differs
# between layers, so it is compiled apart from the blocks.
OPAQUE = EAGER._replace(
    interval_attention=torch.compiler.disable(eager.interval_attention),
    segment=torch.compiler.disable(SEGMENT),
    feature_cache=CompiledWindow,
)


def compiled(case: ModelCase, backend: str | Callable[..., Any] = "inductor") -> Function:
    """Compiles one block of each kind, which the others share; a whole model takes many minutes."""
    change = partial(torch.compile, dynamic=False, backend=backend)
    function = case.function(OPAQUE, "released", change)
    return dynamo_config.patch(recompile_limit=COMPILED_VARIANTS)(function)


def _without_cache(case: ModelCase, backward: bool) -> str | None:
    return None if case.spec.has_cache else "there is no cache, or nothing in it"


# None sets `compiles`: models of full size do not fit on a GPU side by side.
PROVIDERS = as_table(
    Provider(
        "ours", "this package's models and operators", lambda case: case.function(FUSED, "ours")
    ),
    Provider(
        "ours_cached",
        "the same with Pyramid Flow's cache of keys and values",
        lambda case: case.function(FUSED, "cached"),
        refuses=_without_cache,
    ),
    Provider(
        "ours_eager",
        "this package's models and order of work with eager PyTorch's operators",
        lambda case: case.function(EAGER, "ours"),
        default_on=(),
    ),
    Provider(
        "eager",
        "PyTorch as the official models write it, dense mask, their order of work",
        lambda case: case.function(EAGER, "released"),
    ),
    Provider(
        "compile",
        "the same, each block compiled by torch.compile (minutes on a CPU)",
        compiled,
        missing=needs_compiler,
        default_on=("cuda",),
    ),
)
