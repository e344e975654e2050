"""What calls would take on an A100 if kernels reached the share of its peak that they reach on
another GPU, where they were measured.

It takes the files that `bench/report/` leaves in ``bench/results/<gpu>/``; ours alone, in bf16.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from bench.report.groups import OURS, Group, groups

HEADERS = ["call, measured on", "fwd, of peak", "bwd, of peak", "fwd", "bwd"]
DIRECTIONS = "fwd", "bwd"

# A unit's peak on an A100, low and high
Peaks = dict[str, tuple[float, float]]


def files(results: Path) -> Iterator[Path]:
    """Those with shares of a GPU's peak."""
    for folder in sorted(results.glob("nvidia-*")):
        paths = (folder / f"{suite}.json" for suite in ("attention", "memory"))
        yield from filter(Path.exists, paths)


def projections(results: Path, peaks: Peaks) -> list[list[str]]:
    """Rows under `HEADERS`; milliseconds."""
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
        work = row[unit] * row["median_ms"]  # of the call: rate by time
        low, high = (work / (row["fraction_of_peak"] * peak) for peak in reversed(peaks[unit]))
        shares.append(f"{row['fraction_of_peak']:.0%}")
        times.append(f"{low:.3g} to {high:.3g}")
    return [f"{shape}, {gpu}", *shares, *times]
