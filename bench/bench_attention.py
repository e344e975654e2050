"""Attention: ours against PyTorch's, over shapes x dtypes x directions x providers.

``pytest bench/ --benchmark-json=FILE`` measures; ``pytest bench/ --benchmark-disable`` runs each
provider once on toy shapes.
"""

from __future__ import annotations

import pytest

from bench import options
from bench.suites import ATTENTION
from vidgen.shapes import AttentionShape, Direction


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options.parametrize(metafunc, ATTENTION)


def test_attention(
    spec: AttentionShape, dtype: str, direction: Direction, provider: str, measured, record
) -> None:
    outcome = measured(ATTENTION, spec, dtype, backward=direction != "fwd")[provider]
    labels = {"op": "attention", "shape": spec.name, "direction": direction, "provider": provider}
    more = {"model": spec.model, "density": spec.density, "mask_ms": outcome.setup_ms}
    record(outcome, labels, dtype, {"tflops": spec.flops(direction) / 1e12}, **more)
