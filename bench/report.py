"""Results JSON -> a table on the terminal, plots, and the README of a results folder.

``python bench/report.py RESULTS.json [--output DIR] [--merge]`` files new results under
``bench/results/<gpu>`` and regenerates everything there; without a new file it regenerates a
folder: ``python bench/report.py bench/results/<gpu>``. Numbers in documents come from here and are
never typed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).resolve().parent / "results"
OURS = "ours"
BASELINES = (
    "sdpa_dense",
    "sdpa_full",
)  # the first that a shape has: what a model does without our kernels
DIRECTIONS = ("fwd", "bwd", "fwd+bwd")
KEY = ("op", "shape", "dtype", "direction", "provider")
SPEEDUP = re.compile(r"~?([\d.]+)x")
NOISY = 0.1  # a spread (interquartile range over median) above this is shown

# Okabe and Ito's palette, readable with any colour vision; ours is the strong one.
COLOURS = {
    "ours": "#D55E00",
    "sdpa_dense": "#999999",
    "sdpa_full": "#666666",
    "sdpa_per_block": "#009E73",
    "sdpa_flash_per_block": "#009E73",
    "sdpa_cudnn_per_block": "#56B4E9",
    "flex": "#0072B2",
    "flex_max_autotune": "#CC79A7",
}


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


def merge(old: dict, new: dict) -> dict:
    """Old results, the new ones in their place; a provider is measured or not, never both."""

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


def file_results(new: dict, folder: Path, keep_old: bool) -> None:
    """One JSON per op in ``folder``, then its plots and README."""
    new.setdefault("not_measured", [])
    for op in sorted({g.op for g in groups(new)}):
        of_op = {
            **new,
            "benchmarks": [b for b in new["benchmarks"] if b["extra_info"]["op"] == op],
            "not_measured": [r for r in new["not_measured"] if r["op"] == op],
        }
        path = folder / f"{op}.json"
        if keep_old and path.exists():
            of_op = merge(json.loads(path.read_text()), of_op)
        write(path, json.dumps(of_op, indent=1) + "\n")
    regenerate(folder)


def regenerate(folder: Path) -> None:
    sections = []
    for path in sorted(folder.glob("*.json")):
        results = json.loads(path.read_text())
        if "benchmarks" not in results:  # launch configurations live here too
            continue
        found = groups(results)
        for name, plot in (("speedup", plot_speedup), ("peak", plot_peak)):
            plot(found, folder / f"{path.stem}_{name}.png")
        sections.append(markdown(results, found, path.stem))
    write(folder / "README.md", "\n".join(sections))


# ---- tables


def cells(group: Group, peers: list[str]) -> list[str]:
    """Ours in numbers, then how many times faster than each peer it is."""
    ours = group.rows.get(OURS)
    if ours is None:
        status = group.missing.get(OURS, {}).get("status", "-")
        return [group.shape, status, "-", "-", "-", "-", *["-"] * len(peers)]
    rate = f"{ours['tflops']:.3g}" if "tflops" in ours else f"{ours['gbps']:.0f}"
    noise = f" ±{ours['spread']:.0%}" if ours["spread"] > NOISY else ""
    return [
        group.shape,
        f"{_milliseconds(ours['median_ms'])}{noise}",
        rate,
        f"{ours['fraction_of_peak']:.0%}",
        f"{ours['peak_memory_mb']:.0f}",
        f"{ours['max_error']:.0e}",
        *(_against(group, peer) for peer in peers),
    ]


def _milliseconds(x: float) -> str:
    return f"{x:.3g}" if x < 1000 else f"{x:.0f}"


def _against(group: Group, peer: str) -> str:
    speedup = group.speedup(OURS, over=peer)
    if speedup is not None:
        noise = "~" if group.rows[peer]["spread"] > NOISY else ""
        return f"{noise}{speedup:.2f}x"
    status, reason = (group.missing.get(peer, {}).get(key, "") for key in ("status", "reason"))
    if reason == "out of memory":
        return "no memory"
    return {"wrong": "WRONG", "failed": "failed", "postponed": "later"}.get(status, "-")


def headers(found: list[Group], peers: list[str]) -> list[str]:
    unit = "TFLOP/s" if any("tflops" in r for g in found for r in g.rows.values()) else "GB/s"
    return [
        "shape",
        "ours, ms",
        unit,
        "of peak",
        "MB",
        "error",
        *(f"vs {p}".replace("_", " ") for p in peers),
    ]


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
    for (op, dtype, direction), part in _sections(found):
        peers = measured_peers(part)
        table = Table(title=f"{op}, {dtype}, {direction}", title_justify="left")
        for i, name in enumerate(headers(part, peers)):
            header = name.replace("vs ", "vs\n")
            table.add_column(header, justify="left" if i == 0 else "right", no_wrap=i == 0)
        for group in part:
            table.add_row(*(_coloured(cell) for cell in cells(group, peers)))
        console.print(table)
    console.print(f"[dim]{LEGEND}[/dim]")
    for reason in reasons(found):
        console.print(f"[dim]not measured: {reason}[/dim]", highlight=False)


LEGEND = (
    "vs: how many times faster ours is. of peak: of a large matrix product in the same run. "
    "MB: most memory of a call. error: largest, relative to the largest reference value. "
    "~ and ±: interquartile range above 10 %."
)


def _coloured(cell: str) -> str:
    if speedup := SPEEDUP.fullmatch(cell):
        return f"[green]{cell}[/]" if float(speedup[1]) >= 1 else f"[red]{cell}[/]"
    return f"[bold red]{cell}[/]" if cell in ("WRONG", "failed", "wrong") else cell


def _sections(found: list[Group]) -> list[tuple[tuple[str, str, str], list[Group]]]:
    keys = dict.fromkeys((g.op, g.dtype, d) for g in found for d in DIRECTIONS)
    parts = (
        (key, [g for g in found if (g.op, g.dtype, g.direction) == key and g.rows]) for key in keys
    )
    return [(key, part) for key, part in parts if part]


def markdown(results: dict, found: list[Group], op: str) -> str:
    machine = results["machine_info"]
    commits = sorted({r["commit"] for g in found for r in g.rows.values()})
    peaks = {
        g.dtype: r["tflops"] / r["fraction_of_peak"]
        for g in found
        for r in g.rows.values()
        if "tflops" in r
    }
    lines = [
        f"# {op.capitalize()} on {machine['gpu']}",
        "",
        "Generated by `bench/report.py` from the JSON beside it; do not edit.",
        "",
        f"* torch {machine['torch']}, triton {machine['triton']}, commit {', '.join(commits)}, "
        f"{results['datetime'][:10]}",
        *(f"* peak measured in the same run, {d}: {peak:.3g} TFLOP/s" for d, peak in peaks.items()),
        *(f"* {caveat}" for caveat in caveats(machine)),
        f"* {LEGEND}",
        "",
        f"![speed-up over the dense mask]({op}_speedup.png)",
        "",
        f"![share of peak]({op}_peak.png)",
        "",
    ]
    for (_, dtype, direction), part in _sections(found):
        peers = measured_peers(part)
        lines += [
            f"## {dtype}, {direction}",
            "",
            *_markdown_table(headers(part, peers), part, peers),
            "",
        ]
    lines += ["## Mask creation, ms, once per layout and not part of the times above", ""]
    lines += _mask_table(found)
    lines += ["", "## Not measured", "", *(f"* {reason}" for reason in reasons(found)), ""]
    return "\n".join(lines)


REDUCED_NOTE = (
    "**reduced set** for a CPU: real token layouts at batch 1 and at most 8 heads; "
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


def _mask_table(found: list[Group]) -> list[str]:
    forward = [g for g in found if g.direction == "fwd" and g.rows]
    names = list(dict.fromkeys(p for g in forward for p in g.rows))
    rows = [["shape", *names], ["---", *["---:"] * len(names)]]
    for g in forward:
        times = (g.rows.get(name, {}).get("mask_ms") for name in names)
        rows.append([g.shape, *("-" if t is None else f"{t:.2g}" for t in times)])
    return ["| " + " | ".join(row) + " |" for row in rows]


# ---- plots


def plot_speedup(found: list[Group], path: Path) -> None:
    """Speed-up over the dense mask; the bar is what skipping hidden pairs alone can give."""

    def draw(axes, y: int, group: Group) -> None:
        baseline = group.baseline
        bound = 1 / next(iter(group.rows.values())).get("density", 1)
        axes.barh(y, bound, height=0.7, color="#EEEEEE", zorder=0)
        for provider in group.rows:
            if (speedup := group.speedup(provider, over=baseline)) is not None:
                _dot(axes, speedup, y, provider)

    _dot_plot(
        found, path, draw, "times faster than a dense mask (grey: pairs / visible pairs)", start=1
    )


def plot_peak(found: list[Group], path: Path) -> None:
    """Share of the machine's peak, counting visible pairs only."""

    def draw(axes, y: int, group: Group) -> None:
        for provider, row in group.rows.items():
            _dot(axes, 100 * row["fraction_of_peak"], y, provider)

    _dot_plot(found, path, draw, "useful work, % of measured peak", start=0)


def _dot(axes, x: float, y: int, provider: str) -> None:
    is_ours = provider == OURS
    colour = COLOURS.get(provider, "#E69F00")
    axes.scatter(
        x, y, s=60 if is_ours else 34, color=colour, zorder=3 if is_ours else 2, label=provider
    )


def _dot_plot(found: list[Group], path: Path, draw, label: str, start: float) -> None:
    """A row per shape, a panel per direction, a dot per provider."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = [g for g in found if g.rows]
    shapes = list(dict.fromkeys((g.shape, g.dtype) for g in found))
    directions = [d for d in DIRECTIONS if any(g.direction == d for g in found)]
    size = (2.5 + 3.6 * len(directions), 1.6 + 0.3 * len(shapes))
    figure, panels = pyplot.subplots(
        1,
        len(directions),
        figsize=size,
        sharey=True,
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, direction in zip(panels[0], directions, strict=True):
        for group in found:
            if group.direction == direction:
                draw(axes, shapes.index((group.shape, group.dtype)), group)
        axes.axvline(start, color="black", linewidth=0.8, zorder=1)
        axes.set_title(direction, fontsize=10)
        axes.grid(axis="both", color="#DDDDDD", linewidth=0.5, zorder=0)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(left=False, labelsize=8)
    first = panels[0][0]
    first.set_xlim(left=0)
    first.set_yticks(range(len(shapes)), [f"{shape}  {dtype}" for shape, dtype in shapes])
    first.set_ylim(len(shapes) - 0.5, -0.5)
    figure.supxlabel(label, fontsize=9)
    entries = {}
    for axes in panels[0]:
        entries |= {
            name: handle for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
        }
    figure.legend(
        entries.values(), entries, loc="outside upper center", ncols=4, fontsize=8, frameon=False
    )
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=130)
    os.replace(temporary, path)
    pyplot.close(figure)


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
