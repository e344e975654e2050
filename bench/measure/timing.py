"""How a call is measured: providers are checked first, then timed in turns from a cold cache.

`bench/conftest.py` calls `measure_group` for every shape; `bench/gpu/` uses the parts.

A GPU is timed by CUDA events around the replay of a CUDA graph. A call that cannot be captured is
launched eagerly, and its outcome says so. The L2 cache is flushed before every sample; the flush
also keeps the GPU busy while the host launches what is timed. A CPU is timed by its monotonic
clock.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
import triton

from bench.measure.case import Case, Function, as_tuple
from bench.measure.failures import LOST, ContextLost, first_line
from bench.measure.provider import Provider

Step = Callable[[], object]

CPU_THREADS = 2
RATES = ("tflops", "gbps")  # units in which `peak` is measured
MIN_SAMPLES, MAX_SAMPLES = 5, 40
CUDA_SECONDS = 0.25  # per provider; on a CPU each suite has its own
FLUSH_BYTES = 256 << 20  # several times any L2 cache


@dataclass
class Outcome:
    """The outcome for one provider: its samples, or the reason there are none."""

    status: str = "measured"  # or "unavailable", "wrong", "failed", "postponed"
    reason: str = ""
    samples: dict[str, list[float]] = field(default_factory=dict)  # direction -> seconds
    max_error: float | None = None
    setup_ms: float | None = None  # mask creation, once per layout and not part of the samples
    peak_memory_mb: float | None = None
    launch: str = ""  # "graph", "eager" or "cpu"


def measure_group(
    case: Case,
    backward: bool,
    providers: list[Provider],
    seconds: float = CUDA_SECONDS,
    once: bool = False,
    graphs: bool = True,
) -> dict[str, Outcome]:
    """Checks every provider on one case, then times them in turns.

    ``seconds`` is the time of each provider; with ``once`` each makes one call. ``graphs``: on a
    GPU, calls that can be captured are replayed as CUDA graphs. With ``backward`` a sample is a
    forward and the backward that follows it, each with its own time.
    """
    torch.compiler.reset()  # past eight shapes a compiled function would silently run uncompiled
    device = case.device
    outcomes = {provider.name: Outcome() for provider in providers}
    try:
        calls = _prepare_all(case, backward, providers, graphs, outcomes)
        _interleave(calls, outcomes, device, 0.0 if once else seconds)
    except ContextLost as problem:
        for outcome in outcomes.values():
            if outcome.status == "measured":
                outcome.status, outcome.reason = "postponed", str(problem)
    else:
        calls.clear()
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the graphs' pools
    return outcomes


def _prepare_all(
    case: Case,
    backward: bool,
    providers: list[Provider],
    graphs: bool,
    outcomes: dict[str, Outcome],
) -> dict[str, list[Step]]:
    """The steps of all providers that are present and give the right results."""
    calls = {}
    for provider in providers:
        outcome = outcomes[provider.name]
        reason = provider.missing(case.device) or provider.refuses(case, backward)
        if reason:
            outcome.status, outcome.reason = "unavailable", reason
            continue
        with _recording_failure(outcome):
            calls[provider.name] = _prepare(provider, case, backward, graphs, outcome)
    return {name: steps for name, steps in calls.items() if steps}


def _prepare(
    provider: Provider, case: Case, backward: bool, graphs: bool, outcome: Outcome
) -> list[Step] | None:
    """The steps to time, or None where the provider gives wrong results."""
    provider.setup(case)  # so that the time below has no compiling in it
    start = time.perf_counter()
    function = provider.setup(case)
    _synchronize(case.device)
    outcome.setup_ms = (time.perf_counter() - start) * 1e3
    outcome.max_error = case.disagreement(function, backward)
    allowed = case.allowed(backward)
    if not outcome.max_error <= allowed:  # true of NaN, too
        outcome.status = "wrong"
        outcome.reason = f"error {outcome.max_error:.1e}, allowed {allowed:.0e}"
        return None
    steps = make_steps(case, function, backward)
    outcome.peak_memory_mb = peak_memory(steps, case.device) / 2**20
    outcome.launch = "cpu" if case.device.type == "cpu" else "graph" if graphs else "eager"
    if outcome.launch == "graph":
        stream = torch.cuda.current_stream()
        try:
            return captured(steps)
        except RuntimeError:  # a call that allocates or reads back in a way a graph forbids
            torch.cuda.set_stream(stream)  # a failed capture stays on its own stream
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            outcome.launch = "eager"
    return steps


def make_steps(case: Case, function: Function, backward: bool) -> list[Step]:
    """``[forward]`` without gradients, or ``[forward, backward]``."""
    if not backward:
        leaves = case.leaves

        def inference() -> None:
            with torch.no_grad():
                function(*leaves)

        return [inference]
    leaves = [x.detach().requires_grad_() for x in case.leaves]
    upstream = case.upstream(as_tuple(function(*leaves)))
    live = {}

    def forward() -> None:
        live["grads"] = None  # frees the gradients of the call before
        live["out"] = as_tuple(function(*leaves))

    def backward_() -> None:
        live["grads"] = torch.autograd.grad(live.pop("out"), leaves, upstream, allow_unused=True)

    return [forward, backward_]


@dataclass
class Replay:
    """A captured step. It keeps the masks and sort orders that the graph reads by address."""

    graph: torch.cuda.CUDAGraph
    keeps: list[Step]

    def __call__(self) -> None:
        self.graph.replay()


def captured(steps: list[Step]) -> list[Step]:
    """The same steps as CUDA graphs that share one memory pool and are replayed in order."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in steps:
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graphs, pool = [], torch.cuda.graph_pool_handle()
    for step in steps:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            step()
        graphs.append(graph)
    return [Replay(graph, steps) for graph in graphs]


def _interleave(
    calls: dict[str, list[Step]],
    outcomes: dict[str, Outcome],
    device: torch.device,
    seconds: float,
) -> None:
    """Takes samples in rounds, one of each provider, in rotating order: clocks drift for all alike.

    A provider drops out when it has used its ``seconds`` and has `MIN_SAMPLES`, so that quick ones
    get more samples. Without any ``seconds`` there is one round and no warm-up.
    """
    names = list(calls)
    if seconds:
        _interleave_round(names, calls, outcomes, device)  # warms up
        for name in names:
            outcomes[name].samples.clear()
    spent = dict.fromkeys(names, 0.0)
    for turn in range(MAX_SAMPLES if seconds else 1):
        start = turn % max(len(names), 1)
        active = [
            name
            for name in names[start:] + names[:start]
            if outcomes[name].status == "measured" and (turn < MIN_SAMPLES or spent[name] < seconds)
        ]
        for name, taken in _interleave_round(active, calls, outcomes, device).items():
            spent[name] += taken


def _interleave_round(names, calls, outcomes, device) -> dict[str, float]:
    """Takes one sample of each provider and returns the seconds it took."""
    spent = {}
    for name in names:
        with _recording_failure(outcomes[name]):
            times = time_steps(calls[name], device)
            spent[name] = sum(times)
            samples = outcomes[name].samples
            if len(times) == 1:
                samples.setdefault("fwd", []).append(times[0])
            else:
                samples.setdefault("bwd", []).append(times[1])
                samples.setdefault("fwd+bwd", []).append(sum(times))
    return spent


@contextmanager
def _recording_failure(outcome: Outcome):
    """Turns an exception, such as running out of memory, into an outcome, and the run goes on."""
    try:
        yield
        return
    except torch.OutOfMemoryError:
        outcome.status, outcome.reason = "failed", "out of memory"
    except Exception as error:
        outcome.status = "failed"
        outcome.reason = f"{type(error).__name__}: {first_line(error)[:200]}"
    outcome.samples.clear()
    try:
        clear_after_failure()
    except ContextLost as problem:
        outcome.reason = f"{problem}: {outcome.reason}"
        raise


def context_is_lost() -> bool:
    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def clear_after_failure() -> None:
    """Frees memory for the next provider. Raises ContextLost if the GPU is lost to the process."""
    if context_is_lost():
        raise ContextLost(LOST)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def time_steps(steps: list[Step], device: torch.device) -> list[float]:
    """Runs the steps one after another and returns the seconds of each."""
    if device.type == "cpu":
        marks = [time.perf_counter()]
        for step in steps:
            step()
            marks.append(time.perf_counter())
        return [b - a for a, b in pairwise(marks)]
    _flush_buffer().zero_()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(steps) + 1)]
    events[0].record()
    for step, event in zip(steps, events[1:], strict=True):
        step()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]


@cache
def _flush_buffer() -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_memory(steps: list[Step], device: torch.device) -> int:
    """The most bytes that the steps hold at once, beyond what was held before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for step in steps:
            step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        for step in steps:
            step()
    assert profile.kineto_results is not None
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@cache
def peak(unit: str, dtype: torch.dtype, device: torch.device) -> float:
    """The best this machine does: TFLOP/s of a large matrix product, or GB/s of a large copy."""
    large = device.type == "cuda"
    if unit == "tflops":
        n = 8192 if large else 2048
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        work, step = 2 * n**3 / 1e12, lambda: a @ b
    else:
        n_bytes = 1 << (30 if large else 27)
        source = torch.zeros(n_bytes, device=device, dtype=torch.int8)
        target = torch.zeros_like(source)
        work, step = 2 * n_bytes / 1e9, lambda: target.copy_(source)
    return work / min(time_steps([step], device)[0] for _ in range(12))


@cache
def environment() -> dict[str, str]:
    """The machine and the versions that the numbers were taken with."""
    has_gpu = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if has_gpu else "cpu",
        "commit": _commit(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda or "" if has_gpu else "",
    }


def _commit() -> str:
    """The commit; ``VIDGEN_COMMIT`` names it where the source comes without its history."""
    if named := os.environ.get("VIDGEN_COMMIT"):
        return named
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    root = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
