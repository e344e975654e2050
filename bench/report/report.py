"""Results JSON -> a table on the terminal, plots, README and HTML page of a results folder.

    python bench/report/report.py RESULTS.json [--output DIR] [--merge]    files new results
    python bench/report/report.py bench/results/<gpu>                      regenerates a folder

New results go to ``bench/results/<gpu>``, and everything there is regenerated. Numbers in documents
come from here and are never typed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run by path, with nothing installed

from bench.report.groups import (
    ATTENTION,
    DIRECTIONS,
    OURS,
    SAMPLERS,
    SCALING,
    Group,
    Suite,
    curves,
    exponent,
    groups,
    merge,
)
from bench.report.page import page
from bench.report.plots import plot_curves, plot_peak, plot_speedup

RESULTS = Path(__file__).resolve().parents[1] / "results"
SPEEDUP = re.compile(r"~?([\d.]+)x")
NOISY = 0.1  # a spread (interquartile range over median) above this is shown


def file_results(new: dict, folder: Path, keep_old: bool) -> None:
    """One JSON per suite in ``folder``, then its plots and README."""
    new.setdefault("not_measured", [])
    ops = {g.suite.name: {h.op for h in groups(new) if h.suite is g.suite} for g in groups(new)}
    for suite, of_suite in ops.items():
        part = {
            **new,
            "benchmarks": [b for b in new["benchmarks"] if b["extra_info"]["op"] in of_suite],
            "not_measured": [r for r in new["not_measured"] if r["op"] in of_suite],
        }
        path = folder / f"{suite}.json"
        if keep_old and path.exists():
            part = merge(json.loads(path.read_text()), part)
        write(path, json.dumps(part, indent=1) + "\n")
    regenerate(folder)


def regenerate(folder: Path) -> None:
    sections = []
    for path in sorted(folder.glob("*.json")):
        results = json.loads(path.read_text())
        if "benchmarks" not in results:  # launch configurations live here too
            continue
        found = groups(results)
        plot_speedup(found, folder / f"{path.stem}_speedup.png")
        if found[0].suite is SCALING:
            plot_curves(found, folder / f"{path.stem}_curves.png")
        if found[0].suite.peak:
            plot_peak(found, folder / f"{path.stem}_peak.png")
        sections.append(markdown(results, found))
    text = "\n".join(sections)
    write(folder / "README.md", text)
    write(folder / "report.html", page(text, folder))


# ---- tables


def cells(group: Group, peers: list[str]) -> list[str]:
    """Ours in numbers, then how many times faster than each peer it is."""
    ours = group.rows.get(OURS)
    if ours is None:
        status = group.missing.get(OURS, {}).get("status", "-")
        return [group.shape, status, *["-"] * (len(headers([group], peers)) - 2)]
    noise = f" ±{ours['spread']:.0%}" if ours["spread"] > NOISY else ""
    share = ours.get("measured_share", 1)
    return [
        f"{group.shape} (projected from {share:.0%})" if share < 1 else group.shape,
        f"{_three_digits(group.suite.duration(ours))}{noise}",
        _three_digits(ours[group.suite.rate]),
        *([f"{ours['fraction_of_peak']:.0%}"] if group.suite.peak else []),
        f"{ours['peak_memory_mb']:.0f}",
        f"{ours['max_error']:.0e}",
        *(_against(group, peer) for peer in peers),
    ]


def _three_digits(x: float) -> str:
    return f"{x:.3g}" if x < 1000 else f"{x:.0f}"


def _against(group: Group, peer: str) -> str:
    if _is_variant(peer) and peer in group.rows:
        return _three_digits(group.suite.duration(group.rows[peer]))
    speedup = group.speedup(OURS, over=peer)
    if speedup is not None:
        noise = "~" if group.rows[peer]["spread"] > NOISY else ""
        return f"{noise}{speedup:.2f}x"
    status, reason = (group.missing.get(peer, {}).get(key, "") for key in ("status", "reason"))
    if reason == "out of memory":
        return "no memory"
    return {"wrong": "WRONG", "failed": "failed", "postponed": "later"}.get(status, "-")


def headers(found: list[Group], peers: list[str]) -> list[str]:
    suite = found[0].suite
    return [
        "shape",
        f"ours, {suite.time}",
        suite.unit,
        *(["of peak"] if suite.peak else []),
        "MB",
        "error",
        *((f"{p}, {suite.time}" if _is_variant(p) else f"vs {p}").replace("_", " ") for p in peers),
    ]


def _is_variant(provider: str) -> bool:
    """Ours in another way, no peer: its own time is shown."""
    return provider.startswith(f"{OURS}_")


def measured_peers(found: list[Group]) -> list[str]:
    """In order of first appearance; absent ones are explained below, not given a column."""
    names = (p for g in found for p in (*g.rows, *_broken(g)))
    return [name for name in dict.fromkeys(names) if name != OURS]


def _broken(group: Group) -> list[str]:
    return [p for p, row in group.missing.items() if row["status"] in ("wrong", "failed")]


def reasons(found: list[Group]) -> list[str]:
    """Why providers are missing, each said once, with the shapes and directions it holds for."""
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


def print_report(found: list[Group], console: Console) -> None:
    for (suite, dtype, direction), part in _sections(found):
        peers = measured_peers(part)
        table = Table(title=f"{suite.name}, {dtype}, {direction}", title_justify="left")
        for i, name in enumerate(headers(part, peers)):
            header = name.replace("vs ", "vs\n")
            table.add_column(header, justify="left" if i == 0 else "right", no_wrap=i == 0)
        for group in part:
            table.add_row(*(_coloured(cell) for cell in cells(group, peers)))
        console.print(table)
    for suite in dict.fromkeys(g.suite for g in found):
        console.print(f"[dim]{suite.name}: {legend(suite)}[/dim]")
    for reason in reasons(found):
        console.print(f"[dim]not measured: {reason}[/dim]", highlight=False)


def legend(suite: Suite) -> str:
    share = f"of peak: of a {suite.peak} in the same run. " if suite.peak else ""
    if suite is SAMPLERS:
        share = "projected: measured is an even share of the video's work. "
    return (
        f"vs: how many times faster ours is. {share}"
        "MB: most memory of a call. error: largest, relative to the largest reference value. "
        "~ and ±: interquartile range above 10 %."
    )


def _coloured(cell: str) -> str:
    if speedup := SPEEDUP.fullmatch(cell):
        return f"[green]{cell}[/]" if float(speedup[1]) >= 1 else f"[red]{cell}[/]"
    return f"[bold red]{cell}[/]" if cell in ("WRONG", "failed", "wrong") else cell


def _sections(found: list[Group]) -> list[tuple[tuple[Suite, str, str], list[Group]]]:
    keys = dict.fromkeys((g.suite, g.dtype, d) for g in found for d in DIRECTIONS)
    parts = (
        (key, [g for g in found if (g.suite, g.dtype, g.direction) == key and g.rows])
        for key in keys
    )
    return [(key, part) for key, part in parts if part]


def markdown(results: dict, found: list[Group]) -> str:
    machine, suite = results["machine_info"], found[0].suite
    commits = sorted({r["commit"] for g in found for r in g.rows.values()})
    peaks = {g.dtype: _peak(g, r) for g in found for r in g.rows.values() if suite.peak}
    lines = [
        f"# {suite.name.capitalize()} on {machine['gpu']}",
        "",
        "Generated by `bench/report/report.py` from the JSON beside it; do not edit.",
        "",
        f"* torch {machine['torch']}, triton {machine['triton']}, commit {', '.join(commits)}, "
        f"{results['datetime'][:10]}",
        *(
            f"* peak measured in the same run, {dtype}: {peak:.3g} {suite.unit}"
            for dtype, peak in peaks.items()
        ),
        *(f"* {caveat}" for caveat in caveats(machine)),
        f"* {legend(suite)}",
        "",
        f"![speed-up]({suite.name}_speedup.png)",
        "",
        *([f"![share of peak]({suite.name}_peak.png)", ""] if suite.peak else []),
    ]
    if suite is SCALING:
        lines += ["![curves](scaling_curves.png)", "", *_exponent_table(found), ""]
    for (_, dtype, direction), part in _sections(found):
        peers = measured_peers(part)
        lines += [
            f"## {dtype}, {direction}",
            "",
            *_markdown_table(headers(part, peers), part, peers),
            "",
        ]
    if suite is ATTENTION:
        lines += ["## Mask creation, ms, once per layout and not part of the times above", ""]
        lines += [*_mask_table(found), ""]
    lines += ["## Not measured", "", *(f"* {reason}" for reason in reasons(found)), ""]
    return "\n".join(lines)


def _peak(group: Group, row: dict) -> float:
    return row[group.suite.rate] / row["fraction_of_peak"]


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


def _markdown_table(names: list[str], part: list[Group], peers: list[str]) -> list[str]:
    rows = [names, ["---", *["---:"] * (len(names) - 1)], *(cells(g, peers) for g in part)]
    return ["| " + " | ".join(row) + " |" for row in rows]


def _exponent_table(found: list[Group]) -> list[str]:
    """What time grows like: size to this power, over all measured sizes of a curve."""
    every = {(curve.name, curve.dtype, curve.direction): curve.providers for curve in curves(found)}
    names = list(dict.fromkeys(p for providers in every.values() for p in providers))
    rows = [["exponent of", "dtype", "direction", *names], ["---"] * 3 + ["---:"] * len(names)]
    for key, providers in every.items():
        fitted = (exponent(*providers[p]) if p in providers else None for p in names)
        rows.append([*key, *("-" if x is None else f"{x:.2f}" for x in fitted)])
    return ["| " + " | ".join(row) + " |" for row in rows]


def _mask_table(found: list[Group]) -> list[str]:
    forward = [g for g in found if g.direction == "fwd" and g.rows]
    names = list(dict.fromkeys(p for g in forward for p in g.rows))
    rows = [["shape", *names], ["---", *["---:"] * len(names)]]
    for g in forward:
        times = (g.rows.get(name, {}).get("mask_ms") for name in names)
        rows.append([g.shape, *("-" if t is None else f"{t:.2g}" for t in times)])
    return ["| " + " | ".join(row) + " |" for row in rows]


# ---- files


def write(path: Path, text: str) -> None:
    """Whole or not at all: a reader, or a run that is cut short, never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def folder_name(gpu: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Tables and plots from benchmark results.")
    parser.add_argument(
        "results", type=Path, help="results JSON, or a results folder to regenerate"
    )
    parser.add_argument(
        "--output", type=Path, help="folder to file them in (default: bench/results/<gpu>)"
    )
    parser.add_argument(
        "--merge", action="store_true", help="keep older results of other shapes there"
    )
    args = parser.parse_args(argv)
    if args.results.is_dir():
        regenerate(args.results)
        return 0
    results = json.loads(args.results.read_text())
    folder = args.output or RESULTS / folder_name(results["machine_info"]["gpu"])
    file_results(results, folder, keep_old=args.merge)
    found = groups(results)
    for caveat in caveats(results["machine_info"]):
        print(caveat.replace("*", ""))
    console = Console()
    print_report(found, console if console.is_terminal else Console(width=140))
    print(f"results and plots: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
