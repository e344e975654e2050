"""Shows what changed between two results: ``vidgen bench --compare BEFORE.json AFTER.json``.

It compares medians of the same op, shape, dtype, direction and provider. A change counts when it is
larger than `SMALLEST` and than the spread of both measurements. Only ours decides whether something
regressed; peers show how far the machine itself has moved.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run by path, with nothing installed

from bench.report.groups import OURS, groups
from bench.report.terminal import make_console

SMALLEST = 0.05  # a change of the median below this is not shown


@dataclass(frozen=True)
class Change:
    """One provider of one group, before and after."""

    key: tuple[str, ...]  # op, shape, dtype, direction, provider
    before: dict
    after: dict

    @property
    def ratio(self) -> float:
        """Time after over time before: above 1 is slower."""
        return self.after["median_ms"] / self.before["median_ms"]

    @property
    def noise(self) -> float:
        return max(SMALLEST, self.before["spread"], self.after["spread"])

    @property
    def is_slower(self) -> bool:
        return self.ratio > 1 + self.noise

    @property
    def is_faster(self) -> bool:
        return self.ratio < 1 / (1 + self.noise)


def changes(before: dict, after: dict) -> list[Change]:
    """All rows that both have, in the order of ``after``."""
    old = _rows(before)
    return [Change(key, old[key], row) for key, row in _rows(after).items() if key in old]


def lost(before: dict, after: dict) -> list[tuple[str, ...]]:
    """Rows that ``after`` tried and has no times for: the provider failed, is wrong or refused."""
    tried = {(g.op, g.shape, g.dtype, g.direction, p) for g in groups(after) for p in g.missing}
    return [key for key in _rows(before) if key in tried]


def _rows(results: dict) -> dict[tuple[str, ...], dict]:
    return {
        (g.op, g.shape, g.dtype, g.direction, provider): row
        for g in groups(results)
        for provider, row in g.rows.items()
    }


def read(path: Path) -> dict:
    """The results in a file; raises ValueError where it holds none."""
    if not path.is_file():
        raise ValueError(f"compare: expected a results file, {path} is none")
    try:
        results = json.loads(path.read_text())
    except json.JSONDecodeError as problem:
        raise ValueError(f"compare: expected JSON, got {path}: {problem}") from None
    if not isinstance(results, dict) or "benchmarks" not in results:
        raise ValueError(f"compare: expected results of `vidgen bench`, got {path}")
    return results


def print_changes(found: list[Change], gone: list[tuple[str, ...]], console: Console) -> None:
    table = Table(title="changes beyond noise", title_justify="left")
    for name in ("op", "shape", "dtype", "direction", "provider"):
        table.add_column(name)
    for name in ("before, ms", "after, ms", "time"):
        table.add_column(name, justify="right")
    for change in sorted(found, key=lambda c: -c.ratio):
        if change.is_slower or change.is_faster:
            colour = "red" if change.is_slower else "green"
            times = (f"{row['median_ms']:.4g}" for row in (change.before, change.after))
            table.add_row(*change.key, *times, f"[{colour}]{change.ratio - 1:+.0%}[/]")
    console.print(table if table.row_count else "no change beyond noise")
    for key in gone:
        console.print(f"[red]no longer measured: {', '.join(key)}[/]", highlight=False)


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 where ours is slower or lost, 2 for files that do not compare, else 0."""
    parser = argparse.ArgumentParser(description="Two benchmark results side by side.")
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    args = parser.parse_args(argv)
    try:
        before, after = read(args.before), read(args.after)
    except ValueError as problem:
        print(problem, file=sys.stderr)
        return 2
    found, gone = changes(before, after), lost(before, after)
    if not found and not gone:
        print("compare: expected results with common rows, got none", file=sys.stderr)
        return 2
    gpus = [results["machine_info"]["gpu"] for results in (before, after)]
    if gpus[0] != gpus[1]:
        print(f"compare: different machines: {gpus[0]}, {gpus[1]}", file=sys.stderr)
    print_changes(found, gone, make_console())
    slower = sum(change.is_slower for change in found if change.key[-1] == OURS)
    faster = sum(change.is_faster for change in found if change.key[-1] == OURS)
    print(f"ours: {slower} slower, {faster} faster, of {sum(c.key[-1] == OURS for c in found)}")
    return 1 if slower or any(key[-1] == OURS for key in gone) else 0


if __name__ == "__main__":
    sys.exit(main())
