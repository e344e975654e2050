"""Attention: ours against PyTorch's, over shapes x dtypes x directions x providers.

``pytest bench/ --benchmark-json=FILE`` measures, ``pytest bench/ --benchmark-disable`` runs each
once on a toy.
"""

from __future__ import annotations

from itertools import product
from typing import Literal

import pytest

from bench import options
from vidgen.shapes import AttentionShape

# `bwd` and `fwd+bwd` come from the same samples, so they follow each other
DIRECTIONS = ("fwd", "bwd", "fwd+bwd")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = product(
        options.chosen_shapes(metafunc.config),
        options.chosen_dtypes(metafunc.config),
        DIRECTIONS,
        options.chosen_providers(metafunc.config),
    )
    metafunc.parametrize(
        ("shape", "dtype", "direction", "provider"),
        [pytest.param(*case, id="-".join([case[0].name, *case[1:]])) for case in cases],
    )


def test_attention(
    shape: AttentionShape,
    dtype: str,
    direction: Literal["fwd", "bwd", "fwd+bwd"],
    provider: str,
    measured,
    record,
) -> None:
    outcome = measured(shape, dtype, backward=direction != "fwd")[provider]
    labels = {"op": "attention", "shape": shape.name, "direction": direction, "provider": provider}
    record(outcome, labels, dtype, shape.flops(direction), model=shape.model, density=shape.density)
