"""Reads results JSON into groups: all providers of one op, shape, dtype and direction.

All of `bench/report/` works on these. Results of two runs are merged here, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

OURS = "ours"
# What a model does without our kernels: the first of these that a shape has.
BASELINES = ("sdpa_dense", "sdpa_full", "eager")
DIRECTIONS = ("fwd", "bwd", "fwd+bwd")
KEY = ("op", "shape", "dtype", "direction", "provider")


@dataclass(frozen=True)
class Suite:
    """The words of a report on one suite, and the name of its files."""

    name: str
    rate: str  # its name in the results
    unit: str
    peak: str | None  # what the peak is measured with
    over: str  # the baseline in the plot of speed-ups
    time: str = "ms"

    def duration(self, row: dict) -> float:
        """The time in the unit of `time`; that of a video is projected from the measured part."""
        if self.time == "s/video":
            return row["median_ms"] / 1e3 / row["measured_share"]
        return row["median_ms"]


ATTENTION = Suite(
    "attention",
    "tflops",
    "TFLOP/s",
    "large matrix product",
    "a dense mask (grey: pairs / visible pairs)",
)
MEMORY = Suite("memory", "gbps", "GB/s", "large copy", "eager PyTorch")
MODELS = Suite("models", "tokens_per_s", "tokens/s", None, "eager PyTorch", "ms/step")
SAMPLERS = Suite("samplers", "videos_per_hour", "videos/h", None, "eager PyTorch", "s/video")
SCALING = Suite("scaling", "tflops", "TFLOP/s", "large matrix product", ATTENTION.over)
BY_OP = {"attention": ATTENTION, "model": MODELS, "sampler": SAMPLERS, "scaling": SCALING}


@dataclass(frozen=True)
class Group:
    """All providers of one op, shape, dtype and direction."""

    op: str
    shape: str
    dtype: str
    direction: str
    rows: dict[str, dict]  # provider -> extra_info with its `spread`
    missing: dict[str, dict]  # provider -> why it was not measured

    @property
    def suite(self) -> Suite:
        return BY_OP.get(self.op, MEMORY)

    @property
    def baseline(self) -> str | None:
        return next((name for name in BASELINES if name in self.rows), None)

    def speedup(self, provider: str, over: str | None) -> float | None:
        """How many times faster ``provider`` is than ``over``."""
        if provider not in self.rows or over not in self.rows:
            return None
        return self.rows[over]["median_ms"] / self.rows[provider]["median_ms"]


def groups(results: dict) -> list[Group]:
    found: dict[tuple, Group] = {}

    def group(row: dict) -> Group:
        key = tuple(row[name] for name in KEY[:-1])
        return found.setdefault(key, Group(*key, rows={}, missing={}))

    for benchmark in results["benchmarks"]:
        stats, row = benchmark["stats"], benchmark["extra_info"]
        group(row).rows[row["provider"]] = {**row, "spread": stats["iqr"] / stats["median"]}
    for row in results.get("not_measured", []):
        group(row).missing[row["provider"]] = row
    return list(found.values())


@dataclass(frozen=True)
class MeasuredCurve:
    """One curve of the scaling suite in one dtype and direction."""

    name: str
    dtype: str
    direction: str
    providers: dict[str, tuple[list[float], list[float]]]  # sizes, milliseconds


def curves(found: list[Group]) -> list[MeasuredCurve]:
    made: dict[tuple[str, str, str], MeasuredCurve] = {}
    for group in found:
        for provider, row in group.rows.items():
            key = row["curve"], group.dtype, group.direction
            curve = made.setdefault(key, MeasuredCurve(*key, providers={}))
            sizes, times = curve.providers.setdefault(provider, ([], []))
            sizes.append(row["x"])
            times.append(row["median_ms"])
    return list(made.values())


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float | None:
    """Slope of log(seconds) over log(sizes) by least squares; None for fewer than two sizes."""
    if len(set(sizes)) < 2:
        return None
    x, y = ([math.log(v) for v in values] for values in (sizes, seconds))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def merge(old: dict, new: dict) -> dict:
    """Old results with the new ones in their place; a provider is measured or missing, not both."""

    def key(row: dict) -> tuple:
        return tuple(row[name] for name in KEY)

    replaced = {key(b["extra_info"]) for b in new["benchmarks"]} | {
        key(r) for r in new["not_measured"]
    }
    kept = [b for b in old["benchmarks"] if key(b["extra_info"]) not in replaced]
    reasons = [r for r in old.get("not_measured", []) if key(r) not in replaced]
    return {
        **new,
        "benchmarks": kept + new["benchmarks"],
        "not_measured": reasons + new["not_measured"],
    }
