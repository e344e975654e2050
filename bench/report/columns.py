"""The tables of a report: what their columns show, and what is said about a suite below them.

`terminal.py` prints these tables, `readme.py` writes them as Markdown.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from bench.report.groups import DIRECTIONS, OURS, SAMPLERS, Group, Suite

NOISY = 0.1  # a spread (interquartile range over median) above this is marked
SPEEDUP = re.compile(r"~?([\d.]+)x")  # a cell that says how many times faster ours is
BROKEN = ("WRONG", "wrong", "failed")  # cells of a provider that gives no result


class Column(NamedTuple):
    header: str
    cell: Callable[[Group, dict], str]  # takes a group and the row of ours in it


@dataclass(frozen=True)
class Table:
    """All groups of one suite, dtype and direction, a row for each."""

    suite: Suite
    dtype: str
    direction: str
    headers: list[str]
    rows: list[list[str]]


def tables(found: list[Group]) -> list[Table]:
    made = []
    for suite, dtype, direction in dict.fromkeys(
        (g.suite, g.dtype, d) for g in found for d in DIRECTIONS
    ):
        key = suite, dtype, direction
        part = [g for g in found if (g.suite, g.dtype, g.direction) == key and g.rows]
        if part:
            shown = columns(part)
            headers = [column.header for column in shown]
            made.append(Table(*key, headers, [_cells(group, shown) for group in part]))
    return made


def columns(found: list[Group]) -> list[Column]:
    """The numbers of ours, then how it compares with each other provider."""
    suite = found[0].suite
    peak = [Column("of peak", lambda group, ours: f"{ours['fraction_of_peak']:.0%}")]
    return [
        Column("shape", _shape),
        Column(f"ours, {suite.time}", _time),
        Column(suite.unit, lambda group, ours: three_digits(ours[suite.rate])),
        *(peak if suite.peak else []),
        Column("MB", lambda group, ours: f"{ours['peak_memory_mb']:.0f}"),
        Column("error", lambda group, ours: f"{ours['max_error']:.0e}"),
        *(_comparison(suite, provider) for provider in _others(found)),
    ]


def _cells(group: Group, shown: list[Column]) -> list[str]:
    ours = group.rows.get(OURS)
    if ours is None:
        status = group.missing.get(OURS, {}).get("status", "-")
        return [group.shape, status, *["-"] * (len(shown) - 2)]
    return [column.cell(group, ours) for column in shown]


def _shape(group: Group, ours: dict) -> str:
    share = ours.get("measured_share", 1)
    return f"{group.shape} (projected from {share:.0%})" if share < 1 else group.shape


def _time(group: Group, ours: dict) -> str:
    noise = f" ±{ours['spread']:.0%}" if ours["spread"] > NOISY else ""
    return f"{three_digits(group.suite.duration(ours))}{noise}"


def _others(found: list[Group]) -> list[str]:
    """Providers with a time or a broken result, in order of appearance.

    One that is absent has no column: `reasons` says why it is not measured.
    """
    broken = {"wrong", "failed"}
    names = [
        name
        for g in found
        for name in (*g.rows, *(p for p, row in g.missing.items() if row["status"] in broken))
    ]
    return [name for name in dict.fromkeys(names) if name != OURS]


def _comparison(suite: Suite, provider: str) -> Column:
    """The time of ours in another way (``ours_cached``), or the speed-up over a peer."""
    name = provider.replace("_", " ")
    is_ours = provider.startswith(f"{OURS}_")
    header = f"{name}, {suite.time}" if is_ours else f"vs {name}"

    def cell(group: Group, ours: dict) -> str:
        row = group.rows.get(provider)
        if row is None:
            return _absence(group.missing.get(provider, {}))
        if is_ours:
            return three_digits(suite.duration(row))
        noise = "~" if row["spread"] > NOISY else ""
        return f"{noise}{group.speedup(OURS, over=provider):.2f}x"

    return Column(header, cell)


def _absence(missing: dict) -> str:
    if missing.get("reason") == "out of memory":
        return "no memory"
    shown = {"wrong": "WRONG", "failed": "failed", "postponed": "later"}
    return shown.get(missing.get("status", ""), "-")


def three_digits(x: float) -> str:
    return f"{x:.3g}" if x < 1000 else f"{x:.0f}"


def legend(suite: Suite) -> str:
    """What the columns of a suite mean."""
    share = f"of peak: of a {suite.peak} in the same run. " if suite.peak else ""
    if suite is SAMPLERS:
        share = "projected: measured is an even share of the video's work. "
    return (
        f"vs: how many times faster ours is. {share}"
        "MB: most memory of a call. error: largest, relative to the largest reference value. "
        "~ and ±: interquartile range above 10 %."
    )


def reasons(found: list[Group]) -> list[str]:
    """Why providers are missing: each reason once, with the shapes and directions it holds for."""
    where: dict[tuple, list[Group]] = {}
    for g in found:
        for provider, row in g.missing.items():
            where.setdefault((provider, row["status"], row["reason"]), []).append(g)
    return [
        f"{provider}, {status}: {reason} ({_extent(of, found)})"
        for (provider, status, reason), of in where.items()
    ]


def _extent(some: list[Group], all_of_them: list[Group]) -> str:
    """``all``, or the names of the shapes and directions in ``some``."""
    parts = []
    for get in (lambda g: g.shape, lambda g: g.direction):
        names, everything = (dict.fromkeys(map(get, x)) for x in (some, all_of_them))
        parts += [", ".join(names)] if len(names) < len(everything) else []
    return "; ".join(parts) or "all"


REDUCED_NOTE = (
    "**reduced set** for a CPU: real layouts with small batches and few heads; "
    "says nothing about a GPU"
)


def caveats(machine: dict) -> list[str]:
    """What a reader must know before the numbers."""
    if machine["gpu"] != "cpu":
        return []
    found = [REDUCED_NOTE]
    load, threads = machine.get("load", 0), machine.get("threads", 1)
    if load > threads + 1:
        found.append(f"**the machine was busy**: load {load:.1f} where we ran {threads} threads")
    return found
