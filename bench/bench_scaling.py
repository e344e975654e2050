"""How attention scales with frames, tokens and units, over sizes x dtypes x directions x providers.

``vidgen bench scaling``: the report plots the curves and fits their exponents.
"""

from __future__ import annotations

import pytest

from bench import options
from bench.attention.curves import Point
from bench.suites import SCALING
from vidgen.shapes import Direction


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options.parametrize(metafunc, SCALING)


def test_scaling(
    spec: Point, dtype: str, direction: Direction, provider: str, measured, record
) -> None:
    outcome = measured(SCALING, spec, dtype, backward=direction != "fwd")[provider]
    labels = {"op": "scaling", "shape": spec.name, "direction": direction, "provider": provider}
    more = {"curve": spec.curve, "x": spec.x, "mask_ms": outcome.setup_ms}
    record(outcome, labels, dtype, {"tflops": spec.shape.flops(direction) / 1e12}, **more)
