"""How a call is measured: agreement first, then providers in turns, from a cold cache.

A GPU is timed by CUDA events around the replay of a CUDA graph (a call that cannot be captured is
launched eagerly, and says so), the L2 cache flushed before every sample; the flush also keeps the
GPU busy while the host launches what is timed. A CPU is timed by its monotonic clock.
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
RATES = ("tflops", "gbps")  # those that a machine has a peak of
MIN_SAMPLES, MAX_SAMPLES = 5, 40
CUDA_SECONDS = 0.25  # per provider; on a CPU a suite says how long
FLUSH_BYTES = 256 << 20  # several times any L2 cache


@dataclass
class Outcome:
    """What became of one provider in one group."""

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
    """Every provider on one case: checked, then timed in turns.

    ``once``: one call each. ``graphs``: a GPU replays CUDA graphs, as long as they can be captured.
    With ``backward`` each sample is a forward and the backward that follows, timed one by one.
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
    """The steps of all providers that there are and that are right."""
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
    """The steps to time, or None where the provider computes something else."""
    provider.setup(case)  # compiles what mask creation compiles
    start = time.perf_counter()
    function = provider.setup(case)
    _synchronize(case.device)
    outcome.setup_ms = (time.perf_counter() - start) * 1e3
    outcome.max_error = case.disagreement(function, backward)
    allowed = case.allowed(backward)
    if not outcome.max_error <= allowed:  # so that NaN is wrong
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
            torch.cuda.set_stream(stream)  # a capture that fails does not leave its own
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
        live["grads"] = None  # memory of the call before
        live["out"] = as_tuple(function(*leaves))

    def backward_() -> None:
        live["grads"] = torch.autograd.grad(live.pop("out"), leaves, upstream, allow_unused=True)

    return [forward, backward_]


@dataclass
class Replay:
    """A captured step. A graph reads masks and sort orders by address, so they must outlive it."""

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
    """Rounds of one sample each in rotating order: clock drift and warmth fall on all alike.

    A provider leaves when it has used its ``seconds`` and has its samples, so that slow ones do not
    thin out the rest. No time at all is one sample, not warmed up.
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
    """One sample of each; the seconds it took."""
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
    """Running out of memory, or a peer that raises, is a result and not the end of the run."""
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
    """Memory for whoever is next. Raises ContextLost where there can be nobody."""
    if context_is_lost():
        raise ContextLost(LOST)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def time_steps(steps: list[Step], device: torch.device) -> list[float]:
    """Seconds of each step, run one after another."""
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
    """Most bytes that running the steps holds at once, beyond what was there before."""
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
    """What this machine does at best, today: TFLOP/s of a large matrix product, GB/s of a copy."""
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
    """Where and with what the numbers were taken."""
    has_gpu = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if has_gpu else "cpu",
        "commit": _commit(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda or "" if has_gpu else "",
    }


def _commit() -> str:
    """``VIDGEN_COMMIT`` names it where the source travels without its history."""
    if named := os.environ.get("VIDGEN_COMMIT"):
        return named
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    root = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
