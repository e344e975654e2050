"""How a call is measured: samples within the time allowed, and its peak memory."""

from types import SimpleNamespace

import pytest
import torch

from bench.measure import timing
from bench.measure.provider import Provider

pytestmark = pytest.mark.portable_only

SECONDS = {"quick": 1 / 64, "slow": 1 / 8, "slowest": 2.0}  # of one call, exact in binary


class Clock:
    """Stands for the module `time`: only a call of a provider moves it."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def provider(self, name: str) -> Provider:
        def function() -> torch.Tensor:
            self.now += SECONDS[name]
            return torch.zeros(())

        return Provider(name, summary="", setup=lambda case: function)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


@pytest.mark.parametrize("names", [["quick", "slow", "slowest"], ["slowest", "slow", "quick"]])
def test_a_provider_takes_samples_until_its_time_is_up(clock: Clock, names: list[str]) -> None:
    case = SimpleNamespace(
        device=torch.device("cpu"),
        leaves=(),
        allowed=lambda backward: 0.0,
        disagreement=lambda function, backward: 0.0,
    )
    providers = [clock.provider(name) for name in names]
    outcomes = timing.measure_group(case, False, providers, seconds=1.0)
    samples = {name: outcome.samples["fwd"] for name, outcome in outcomes.items()}
    expected = {"quick": timing.MAX_SAMPLES, "slow": 8, "slowest": timing.MIN_SAMPLES}
    assert samples == {name: [SECONDS[name]] * n for name, n in expected.items()}


def test_peak_memory_of_a_cpu_call() -> None:
    held = []

    def allocate() -> None:
        held.append(torch.empty(1 << 20))
        held.append(torch.empty(1 << 20))
        held.clear()

    assert timing.peak_memory([allocate, allocate], torch.device("cpu")) == 2 * 4 << 20
