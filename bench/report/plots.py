"""The plots of a results folder: speed-up over the baseline, share of the peak, scaling curves."""

from __future__ import annotations

import os
from pathlib import Path

from bench.report.groups import DIRECTIONS, OURS, Group, curves

# Okabe and Ito's palette, readable with any colour vision; ours has the strongest colour.
COLOURS = {
    "ours": "#D55E00",
    "sdpa_dense": "#999999",
    "sdpa_full": "#666666",
    "sdpa_per_block": "#009E73",
    "sdpa_flash_per_block": "#009E73",
    "sdpa_cudnn_per_block": "#56B4E9",
    "flex": "#0072B2",
    "flex_max_autotune": "#CC79A7",
    "eager": "#999999",
    "ours_cached": "#CC79A7",
    "ours_eager": "#009E73",
    "compile": "#0072B2",
    "liger": "#009E73",
    "official": "#CC79A7",
}
OTHER = "#E69F00"


def plot_speedup(found: list[Group], path: Path) -> None:
    """Speed-up over the baseline. A grey bar is what skipping the hidden pairs alone would give."""

    def draw(axes, y: int, group: Group) -> None:
        baseline = group.baseline
        if density := next(iter(group.rows.values())).get("density"):
            axes.barh(y, 1 / density, height=0.7, color="#EEEEEE", zorder=0)
        for provider in group.rows:
            if (speedup := group.speedup(provider, over=baseline)) is not None:
                _dot(axes, speedup, y, provider)

    _dot_plot(found, path, draw, f"times faster than {found[0].suite.over}", start=1)


def plot_peak(found: list[Group], path: Path) -> None:
    """Share of the machine's peak; only visible pairs, or bytes that must move, count as work."""

    def draw(axes, y: int, group: Group) -> None:
        for provider, row in group.rows.items():
            _dot(axes, 100 * row["fraction_of_peak"], y, provider)

    label = f"useful work, % of what a {found[0].suite.peak} reaches"
    _dot_plot(found, path, draw, label, start=0)


def plot_curves(found: list[Group], path: Path) -> None:
    """Time over size, both logarithmic, with a panel for each curve and direction."""
    pyplot = _pyplot()
    from matplotlib.ticker import LogLocator, NullLocator

    every = curves(found)
    names = list(dict.fromkeys((c.name, c.dtype) for c in every))
    directions = [d for d in DIRECTIONS if any(c.direction == d for c in every)]
    shape = len(directions), len(names)
    figure, panels = pyplot.subplots(
        *shape,
        figsize=(3.2 * shape[1], 0.5 + 2.6 * shape[0]),
        squeeze=False,
        sharex="col",
        layout="constrained",
    )
    for curve in every:
        axes = panels[directions.index(curve.direction)][names.index((curve.name, curve.dtype))]
        for provider, (sizes, times) in curve.providers.items():
            axes.plot(
                sizes,
                times,
                marker="o",
                markersize=4,
                color=COLOURS.get(provider, OTHER),
                linewidth=2 if provider == OURS else 1,
                zorder=3 if provider == OURS else 2,
                label=provider,
            )
    for row, direction in zip(panels, directions, strict=True):
        row[0].set_ylabel(f"{direction}, ms", fontsize=9)
        for axes, (name, dtype) in zip(row, names, strict=True):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
            axes.grid(which="major", color="#DDDDDD", linewidth=0.5)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(which="both", labelsize=8)
            axes.xaxis.set_major_formatter("{x:.0f}")
            if direction == directions[-1]:
                axes.set_xlabel(f"{name}, {dtype}", fontsize=8)
    _legend(figure, panels.flat)
    _save(figure, path)


def _dot(axes, x: float, y: int, provider: str) -> None:
    is_ours = provider == OURS
    colour = COLOURS.get(provider, OTHER)
    axes.scatter(
        x, y, s=60 if is_ours else 34, color=colour, zorder=3 if is_ours else 2, label=provider
    )


def _dot_plot(found: list[Group], path: Path, draw, label: str, start: float) -> None:
    """A row per shape, a panel per direction, a dot per provider."""
    pyplot = _pyplot()
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
    _legend(figure, panels[0])
    _save(figure, path)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _legend(figure, panels) -> None:
    """Every provider once, above all panels."""
    entries = {}
    for axes in panels:
        entries |= {
            name: handle for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
        }
    figure.legend(
        entries.values(), entries, loc="outside upper center", ncols=4, fontsize=8, frameon=False
    )


def _save(figure, path: Path) -> None:
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=130)
    os.replace(temporary, path)
    _pyplot().close(figure)
