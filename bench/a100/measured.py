"""Calls measured on other GPUs, projected to an A100; `static.py` shows the result.

It assumes that our kernels reach the same share of the peak there. It reads ours in bf16 from the
files that `bench/report/` writes to ``bench/results/<gpu>/``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from bench.report.groups import OURS, Group, groups

HEADERS = ["call, measured on", "fwd, of peak", "bwd, of peak", "fwd", "bwd"]
DIRECTIONS = "fwd", "bwd"

# Unit -> its peak on an A100, low and high
Peaks = dict[str, tuple[float, float]]


def files(results: Path) -> Iterator[Path]:
    """Results with shares of a GPU's peak."""
    for folder in sorted(results.glob("nvidia-*")):
        paths = (folder / f"{suite}.json" for suite in ("attention", "memory"))
        yield from filter(Path.exists, paths)


def projections(results: Path, peaks: Peaks) -> list[list[str]]:
    """Rows under `HEADERS`; times are milliseconds."""
    rows = []
    for path in files(results):
        found: dict[str, dict[str, Group]] = {}
        for group in groups(json.loads(path.read_text())):
            if group.dtype == "bf16" and OURS in group.rows:
                found.setdefault(group.shape, {})[group.direction] = group
        rows += [_row(shape, of, peaks) for shape, of in found.items()]
    return rows


def _row(shape: str, found: dict[str, Group], peaks: Peaks) -> list[str]:
    gpu = next(iter(found.values())).rows[OURS]["gpu"]
    shares, times = [], []
    for direction in DIRECTIONS:
        group = found.get(direction)
        if group is None:
            shares.append("-")
            times.append("-")
            continue
        row, unit = group.rows[OURS], group.suite.rate
        work = row[unit] * row["median_ms"]  # of the call: rate times time
        low, high = (work / (row["fraction_of_peak"] * peak) for peak in reversed(peaks[unit]))
        shares.append(f"{row['fraction_of_peak']:.0%}")
        times.append(f"{low:.3g} to {high:.3g}")
    return [f"{shape}, {gpu}", *shares, *times]
