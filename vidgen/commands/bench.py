"""`vidgen bench`: times our kernels and models against their peers, or compares two results.

Runs ``pytest bench/ --benchmark-json`` of the source tree in a process of its own, then
``bench/report/report.py`` on what was measured.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from vidgen.common.arguments import names, output_folder
from vidgen.common.installation import (
    BENCH,
    ROOT,
    CommandError,
    require_extra,
    require_source,
    source_environment,
)

# A finished test in pytest's verbose output: its parameters, and how much of the run is done.
FINISHED = re.compile(r"\[(?P<case>\S+)\] [A-Z]+.*\[ *(?P<percent>\d+)%\]")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    ops = ["all", *sorted(p.stem.removeprefix("bench_") for p in BENCH.glob("bench_*.py"))]
    parser.add_argument(
        "op",
        nargs="?",
        default="all",
        choices=ops if BENCH.is_dir() else None,  # without the source, `run` says where it is
        help=f"what to time, of {', '.join(ops)} (default: all)",
    )
    parser.add_argument(
        "--shapes", type=names, metavar="PATTERN", help="shapes by name, e.g. 'wan_*' (commas: or)"
    )
    parser.add_argument(
        "--shape-set",
        choices=["real", "reduced", "toy"],
        help="real (default on a GPU), or reduced: minutes on a CPU (default there)",
    )
    parser.add_argument(
        "--providers", type=names, metavar="NAMES", help="comma-separated; `vidgen info` lists them"
    )
    parser.add_argument(
        "--dtype",
        type=names,
        metavar="NAMES",
        help="bf16, fp16, fp32, fp64 (default: bf16, CPU fp32)",
    )
    parser.add_argument(
        "--output",
        type=output_folder,
        metavar="DIR",
        help="results and plots (default: bench/results/<gpu>)",
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("BEFORE.json", "AFTER.json"),
        help="measure nothing, show what changed between two results",
    )


def run(args: argparse.Namespace) -> int:
    """0 when all was measured and reported, 1 otherwise; with ``--compare`` the script's status.

    Raises:
        CommandError: no source tree, modules missing, or nothing measured.
    """
    require_source(BENCH / "report" / "report.py", "the benchmarks")
    require_extra("bench")
    if args.compare:
        command = [sys.executable, str(BENCH / "report" / "compare.py"), *map(str, args.compare)]
        return subprocess.run(command, env=source_environment(), check=False).returncode
    targets = [BENCH] if args.op == "all" else [BENCH / f"bench_{args.op}.py"]
    filters = [
        f"--{name.replace('_', '-')}={value}"
        for name in ("shapes", "shape_set", "providers", "dtype")
        if (value := getattr(args, name))
    ]
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        command = [
            *(sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider"),
            *(f"--rootdir={ROOT}", f"--config-file={ROOT / 'pyproject.toml'}"),
            f"--benchmark-json={results}",
        ]
        status, log = _run_with_progress([*command, *filters, *map(str, targets)])
        if status:
            print(_explanation(log), file=sys.stderr)
        if not results.exists() or not results.stat().st_size:
            raise CommandError(f"nothing was measured (pytest exit status {status})")
        report = [sys.executable, str(BENCH / "report" / "report.py"), str(results)]
        report += [f"--output={args.output}"] if args.output else []
        report += ["--merge"] if filters or args.op != "all" else []
        reported = subprocess.run(report, env=source_environment(), check=False).returncode
    return 1 if status or reported else 0


def _run_with_progress(command: list[str]) -> tuple[int, list[str]]:
    """The exit status and the output of pytest. Shows a bar where stderr is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    percent = TextColumn("[progress.percentage]{task.percentage:>3.0f}%")
    columns = (percent, BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    log = []
    with (
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=source_environment(),
        ) as process,
    ):
        task = progress.add_task("starting", total=100)
        for line in process.stdout or ():
            log.append(line.rstrip())
            if done := FINISHED.search(line):
                progress.update(task, completed=int(done["percent"]), description=done["case"])
    return process.returncode, log


def _explanation(log: list[str]) -> str:
    """The lines of pytest's output that name errors; without any, the end of the output."""
    errors = [line for line in log if line.startswith(("ERROR:", "FAILED", "ERROR "))]
    return "\n".join(errors or log[-15:])
