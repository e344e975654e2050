"""Seconds of a video, over samplers x dtypes x providers.

From noise to latents, without text encoder and VAE. An even share of a video's work is measured,
and the time of the video is projected from it; ``measured_share`` says how much was measured.
"""

from __future__ import annotations

import pytest

from bench import options
from bench.models.case import ModelStep
from bench.suites import SAMPLERS
from vidgen.shapes import Direction


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options.parametrize(metafunc, SAMPLERS)


def test_samplers(
    spec: ModelStep, dtype: str, direction: Direction, provider: str, measured, record
) -> None:
    outcome = measured(SAMPLERS, spec, dtype, backward=False)[provider]
    labels = {"op": "sampler", "shape": spec.name, "direction": direction, "provider": provider}
    share = spec.measured_share
    record(outcome, labels, dtype, spec.work, model=spec.title, measured_share=share)
