"""Files the results of a run, and makes plots, README and HTML page of a results folder.

    python bench/report/report.py RESULTS.json [--output DIR] [--merge]    files new results
    python bench/report/report.py bench/results/<gpu>                      regenerates a folder

`vidgen bench` and `make gpu STAGE=bench` end with it. New results go to ``bench/results/<gpu>`` and
everything there is regenerated: numbers in documents come from here and are never typed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run by path, with nothing installed

from bench.report.columns import caveats
from bench.report.files import RESULTS, folder_name, write
from bench.report.groups import SCALING, groups, merge
from bench.report.page import page
from bench.report.plots import plot_curves, plot_peak, plot_speedup
from bench.report.readme import section
from bench.report.terminal import make_console, print_report


def file_results(new: dict, folder: Path, keep_old: bool) -> None:
    """Writes one JSON per suite to ``folder``, then its plots and pages."""
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
    """Makes plots, README and HTML page from the JSON files in ``folder``."""
    sections = []
    for path in sorted(folder.glob("*.json")):
        results = json.loads(path.read_text())
        if "benchmarks" not in results:  # launch configurations are kept here too
            continue
        found = groups(results)
        plot_speedup(found, folder / f"{path.stem}_speedup.png")
        if found[0].suite is SCALING:
            plot_curves(found, folder / f"{path.stem}_curves.png")
        if found[0].suite.peak:
            plot_peak(found, folder / f"{path.stem}_peak.png")
        sections.append(section(results, found))
    text = "\n".join(sections)
    write(folder / "README.md", text)
    write(folder / "report.html", page(text, folder))


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
    for caveat in caveats(results["machine_info"]):
        print(caveat.replace("*", ""))
    print_report(groups(results), make_console())
    print(f"results and plots: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
