"""Steps of whole models, over steps x dtypes x directions x providers.

Work is the video tokens of a step, history included. In training, ``fwd`` is the loss without
gradients and ``fwd+bwd`` the whole step; a step of sampling has no backward.
"""

from __future__ import annotations

import pytest

from bench import options
from bench.models.case import ModelStep
from bench.suites import MODELS
from vidgen.shapes import Direction


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options.parametrize(metafunc, MODELS)


def test_models(
    spec: ModelStep, dtype: str, direction: Direction, provider: str, measured, record
) -> None:
    outcome = measured(MODELS, spec, dtype, backward=direction != "fwd")[provider]
    labels = {"op": "model", "shape": spec.name, "direction": direction, "provider": provider}
    record(outcome, labels, dtype, spec.work, model=spec.title)
