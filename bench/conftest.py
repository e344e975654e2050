"""Options of the benchmarks, and how measured samples get into the results of pytest-benchmark.

pytest-benchmark times one function to its end before the next. Our providers take turns instead, as
clock drift would favour some. So the first test of a group measures all its providers in turns
(`measure_group`). Each test then replays its own samples to pytest-benchmark, through a clock that
only they move: statistics and JSON are pytest-benchmark's own.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import options
from bench.measure import timing
from bench.measure.failures import LOST, first_line
from bench.measure.provider import Provider
from bench.measure.timing import Outcome
from bench.options import DTYPES, device
from bench.report.files import write
from bench.report.groups import merge
from bench.suites import Suite
from vidgen.shapes import SETS

NOT_MEASURED = pytest.StashKey[list[dict]]()
STARTED = pytest.StashKey[float]()
EARLIER = pytest.StashKey[dict]()  # what the file of --keep held
CLOCK = {"now": 0.0}


def replay_clock() -> float:
    return CLOCK["now"]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vidgen", "vidgen benchmarks")
    group.addoption("--shapes", default="*", help="shapes by name or pattern, comma-separated")
    group.addoption(
        "--shape-set",
        choices=["auto", *SETS],
        default="auto",
        help="real on a GPU, reduced on a CPU, toy with --benchmark-disable (default: auto)",
    )
    group.addoption(
        "--providers", default="", help="comma-separated (default: all but the slow ones)"
    )
    group.addoption(
        "--dtype", default="", help="bf16, fp16, fp32, fp64 (default: bf16 on a GPU, else fp32)"
    )
    group.addoption(
        "--seconds", type=float, default=float("inf"), help="start no shape that may end after this"
    )
    group.addoption(
        "--skip-shapes", default="", help="shapes not to measure, by name, comma-separated"
    )
    group.addoption(
        "--keep",
        type=Path,
        metavar="FILE",
        help="results JSON that grows as shapes are measured, all suites in turns",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[NOT_MEASURED] = []
    config.stash[STARTED] = time.monotonic()
    kept = config.getoption("--keep")
    config.stash[EARLIER] = json.loads(kept.read_text()) if kept and kept.exists() else {}
    options.check(config)  # so that a mistyped name is reported at once
    if not torch.cuda.is_available():
        torch.set_num_threads(timing.CPU_THREADS)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.filterwarnings("default"))  # peers may warn
            item.add_marker(pytest.mark.benchmark(timer=replay_clock))
    if config.getoption("--keep"):  # if cut short, it has the first shapes of every suite
        items.sort(key=_position())


def _position() -> Callable[[pytest.Item], int]:
    """A sort key: the position of an item's spec in its suite."""
    specs: dict[Path, dict[str, int]] = {}

    def position(item: pytest.Item) -> int:
        of_suite = specs.setdefault(item.path, {})
        callspec = getattr(item, "callspec", None)
        name = callspec.params["spec"].name if callspec else ""
        return of_suite.setdefault(name, len(of_suite))

    return position


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest):
    """``measured(suite, spec, dtype, backward)``: the outcomes of all providers of a group.

    Tests of a group follow each other, so only the last group is kept.
    """
    config, last = request.config, {}

    def outcomes(suite: Suite, spec: Any, dtype: str, backward: bool) -> dict[str, Outcome]:
        key = spec, dtype, backward
        if key not in last:
            last.clear()
            collected = [i.callspec.params for i in request.session.items if hasattr(i, "callspec")]
            wanted = {
                p["provider"]
                for p in collected
                if p.get("spec") is spec and (p["direction"] != "fwd") == backward
            }
            selected = [p for p in suite.providers.values() if p.name in wanted]
            started, stop = config.stash[STARTED], config.getoption("--seconds")
            if time.monotonic() - started + suite.longest_seconds > stop:
                last[key] = _all(selected, "postponed", "time is up")
            elif timing.context_is_lost():
                last[key] = _all(selected, "postponed", LOST)
            else:
                keep(config, measuring=spec.name)
                last[key] = _measure(suite, spec, dtype, backward, selected, config)
        return last[key]

    return outcomes


def _measure(
    suite: Suite,
    spec: Any,
    dtype: str,
    backward: bool,
    providers: list[Provider],
    config: pytest.Config,
) -> dict[str, Outcome]:
    try:
        case = suite.make(spec, DTYPES[dtype], device())
    except Exception as error:  # such as out of memory: the next shape may fit
        reason = f"inputs: {type(error).__name__}: {first_line(error)[:200]}"
        return _all(providers, "failed", reason)
    seconds = timing.CUDA_SECONDS if device().type == "cuda" else suite.cpu_seconds
    once = config.getoption("benchmark_disable")
    return timing.measure_group(case, backward, providers, seconds, once, suite.graphs)


def _all(providers: list[Provider], status: str, reason: str) -> dict[str, Outcome]:
    return {provider.name: Outcome(status, reason) for provider in providers}


def keep(config: pytest.Config, measuring: str | None) -> None:
    """Writes the results so far, and the shape that is measured now, as it may end the process."""
    path = config.getoption("--keep")
    if not path:
        return
    session = config._benchmarksession  # type: ignore[attr-defined]
    new = config.hook.pytest_benchmark_generate_json(
        config=config,
        benchmarks=session.benchmarks,
        include_data=False,
        machine_info=session.get_machine_info(),
        commit_info={},
    )
    pytest_benchmark_update_json(config, session.benchmarks, new)
    earlier = config.stash[EARLIER]
    results = merge(earlier, new) if earlier else new
    if measuring:
        results["measuring"] = measuring
    write(path, json.dumps(results, default=str) + "\n")


def pytest_sessionfinish(session: pytest.Session) -> None:
    keep(session.config, measuring=None)


@pytest.fixture
def record(benchmark, request: pytest.FixtureRequest):
    """``record(outcome, labels, dtype, work)``: reports the samples, or why there are none.

    ``work`` is one number by the name of its rate. Where the rate has a peak, so does the result.
    """

    def record(
        outcome: Outcome, labels: dict[str, str], dtype: str, work: dict[str, float], **more
    ) -> None:
        labels = {**labels, "dtype": dtype}
        if outcome.status != "measured":
            request.config.stash[NOT_MEASURED].append(
                {
                    **labels,
                    "status": outcome.status,
                    "reason": outcome.reason,
                    "max_error": outcome.max_error,
                }
            )
            broken = outcome.status in ("wrong", "failed") and labels["provider"] == "ours"
            message = f"{outcome.status}: {outcome.reason}"
            if broken:
                pytest.fail(message, pytrace=False)
            pytest.skip(message)
        samples = outcome.samples[labels["direction"]]
        remaining = iter(samples)

        def replay() -> None:
            CLOCK["now"] += next(remaining)

        benchmark.pedantic(replay, rounds=len(samples), iterations=1)
        if benchmark.disabled:
            return
        median = benchmark.stats.stats.median
        ((unit, amount),) = work.items()
        rate = amount / median
        if unit in timing.RATES:
            more["fraction_of_peak"] = rate / timing.peak(unit, DTYPES[dtype], device())
        benchmark.extra_info.update(
            **labels,
            **{unit: rate},
            median_ms=median * 1e3,
            peak_memory_mb=outcome.peak_memory_mb,
            max_error=outcome.max_error,
            launch=outcome.launch,
            **timing.environment(),
            **more,
        )

    return record


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info.pop("node", None)  # results are published without the host's name
    load = os.getloadavg()[0]  # ours included
    machine_info.update(timing.environment(), threads=torch.get_num_threads(), load=load)


def pytest_benchmark_update_json(config: pytest.Config, benchmarks, output_json: dict) -> None:
    output_json["not_measured"] = config.stash[NOT_MEASURED]
