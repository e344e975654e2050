"""Steps of models: our kernels against eager PyTorch and its compiler, with the same parameters."""

from __future__ import annotations

import torch

from bench.cases import Function
from bench.model_cases import ModelCase
from bench.providers import Provider, as_table, needs_compiler
from vidgen import eager
from vidgen.ops import EAGER, FUSED

# Traced, every block would build the dense mask anew; so it is built once for all of them.
OPAQUE = EAGER._replace(interval_attention=torch.compiler.disable(eager.interval_attention))


def _compiled(case: ModelCase) -> Function:
    """Block by block: all of a kind share what is compiled, the whole would take many minutes."""
    return case.function(OPAQUE, lambda block: torch.compile(block, dynamic=False))


# None compiles ahead in parallel: models of full size do not fit beside each other.
PROVIDERS = as_table(
    Provider("ours", "this package's operators", lambda case: case.function(FUSED)),
    Provider(
        "eager",
        "PyTorch as the official models write it, dense mask",
        lambda case: case.function(EAGER),
    ),
    Provider(
        "compile",
        "the same, each block compiled by torch.compile (minutes on a CPU)",
        _compiled,
        missing=needs_compiler,
        default_on=("cuda",),
    ),
)
