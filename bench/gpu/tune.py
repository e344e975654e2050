"""Finds launch configurations: candidates are compiled in parallel, checked, and timed.

    python bench/gpu/tune.py [--only 'fwd-*,residual_norm_*'] [--output FILE]     on a GPU

It prints the entries for the families' ``configs.py``; the library never tunes at run time. Results
are written to FILE as they come, and the next run goes on from there. Exit status `CONTEXT_LOST`
asks for such a run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # run by path, with nothing installed

from bench.gpu.subjects import Subject, subjects  # noqa: E402
from bench.measure import timing  # noqa: E402
from bench.measure.case import TOLERANCE, Case  # noqa: E402
from bench.measure.failures import ContextLost, first_line  # noqa: E402
from bench.measure.workers import in_parallel  # noqa: E402
from bench.report.files import RESULTS, folder_name, write  # noqa: E402

SAMPLES, FINALISTS = 15, 4
CONTEXT_LOST = 75  # exit status: a candidate lost the GPU's context, start again for the others
UNFINISHED = "the process ended while this was timed"


def steps_of(case: Case, subject: Subject) -> list[timing.Step]:
    function = subject.suite.providers["ours"].setup(case)
    return timing.make_steps(case, function, subject.backward)


def compile_one(name: str, config: Any) -> str:
    """Fills Triton's cache, in a process of its own; returns why it does not compile, or ""."""
    subject = next(s for s in subjects() if s.name == name)
    try:
        with subject.forced(config):
            for step in steps_of(subject.case(), subject):
                step()
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        timing.clear_after_failure()
        return ""  # too many processes at once; there is room for one alone
    except Exception as error:
        timing.clear_after_failure()
        return _reason(error)
    return ""


def time_one(case: Case, subject: Subject, config: Any) -> dict:
    """The median milliseconds of the pass, or the reason why there are none.

    A backward is timed as a whole: its other kernels add the same to every candidate.
    """
    function = subject.suite.providers["ours"].setup(case)
    try:
        with subject.forced(config):
            error = case.disagreement(function, subject.backward)
            if not error <= TOLERANCE[case.dtype]:
                return {"reason": f"wrong: error {error:.1e}"}
            steps = steps_of(case, subject)
            times = [timing.time_steps(steps, case.device)[-1] for _ in range(SAMPLES)]
            return {"ms": 1e3 * statistics.median(times), "max_error": error}
    except Exception as error:
        return {"reason": _reason(error)}


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)[:120]}"


def play_off(case: Case, subject: Subject, finalists: list[Any]) -> Any:
    """Times the best candidates again, in turns, as clocks had drifted between them."""
    times: dict[int, list[float]] = {i: [] for i in range(len(finalists))}
    steps = steps_of(case, subject)
    for _ in range(SAMPLES):
        for i, config in enumerate(finalists):
            with subject.forced(config):
                times[i].append(timing.time_steps(steps, case.device)[-1])
    return finalists[min(times, key=lambda i: statistics.median(times[i]))]


def tune(chosen: list[Subject], path: Path, seconds: float) -> dict:
    """``{"subjects": {name: {"best": ..., "timed": [...]}}}``, written as it grows.

    Raises ContextLost after a candidate with which this process loses the GPU.
    """
    stop = time.monotonic() + seconds
    major, minor = torch.cuda.get_device_capability()
    found = json.loads(path.read_text()) if path.exists() else {}
    found.update(arch=10 * major + minor, **timing.environment())
    results = found.setdefault("subjects", {})
    todo = {}
    for subject in chosen:
        entry = results.setdefault(subject.name, {"shape": subject.shape, "timed": []})
        known = [row["config"] for row in entry["timed"]]
        todo[subject] = [c for c in subject.candidates() if asdict(c) not in known]
    jobs = [(subject.name, config) for subject, configs in todo.items() for config in configs]
    reasons = precompile(jobs, seconds / 2)
    for subject, configs in todo.items():
        entry = results[subject.name]
        if not configs and "best" in entry:
            continue
        try:
            case = subject.case()
        except torch.OutOfMemoryError:
            print(f"{subject.name}: no memory for {subject.shape}", flush=True)
            timing.clear_after_failure()
            continue
        for config in configs:
            reason = reasons.get((subject.name, config))
            if reason is None or time.monotonic() > stop:
                print("time is up: run again to go on")
                return found
            row = {"config": asdict(config), "reason": reason or UNFINISHED}
            entry["timed"].append(row)
            write(path, json.dumps(found, indent=1) + "\n")
            if not reason:
                del row["reason"]
                row.update(time_one(case, subject, config))
            print(subject.name, config, row.get("ms", row.get("reason")), flush=True)
            write(path, json.dumps(found, indent=1) + "\n")
            if not reason and "reason" in row:
                timing.clear_after_failure()
        best = sorted((t for t in entry["timed"] if "ms" in t), key=lambda t: t["ms"])[:FINALISTS]
        if best:
            kind = type(subject.candidates()[0])
            winner = play_off(case, subject, [kind(**t["config"]) for t in best])
            entry["best"] = asdict(winner)
            entry["snippet"] = subject.snippet(winner, found["arch"])
            write(path, json.dumps(found, indent=1) + "\n")
    return found


def precompile(jobs: list[tuple[str, Any]], seconds: float) -> dict[tuple[str, Any], str]:
    """Why each job does not compile, or "". Jobs that there was no time for are absent.

    All processes share Triton's cache.
    """
    n_workers = max(1, min((os.cpu_count() or 2) - 2, 12))
    if jobs:
        print(f"compiling {len(jobs)} candidates in {n_workers} processes", flush=True)
    return dict(in_parallel(compile_one, jobs, n_workers, seconds))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Sweep launch configurations on this GPU.")
    known = {subject.name: subject for subject in subjects()}
    parser.add_argument("--only", default="*", help=f"patterns, of {', '.join(known)}")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="time no candidate after this"
    )
    parser.add_argument(
        "--output", type=Path, help="default: bench/results/<gpu>/launch_configs.json"
    )
    args = parser.parse_args(argv)
    patterns = args.only.split(",")
    chosen = [s for name, s in known.items() if any(fnmatch(name, p) for p in patterns)]
    if not chosen:
        parser.error(f"--only: {args.only} matches none of {', '.join(known)}")
    if not torch.cuda.is_available():
        print("tune.py: error: needs a CUDA device", file=sys.stderr)
        return 1
    folder = RESULTS / folder_name(torch.cuda.get_device_name())
    try:
        found = tune(chosen, args.output or folder / "launch_configs.json", args.seconds)
    except ContextLost as problem:
        print(f"{problem}: run again to go on", file=sys.stderr)
        return CONTEXT_LOST
    for entry in found["subjects"].values():
        print(entry.get("snippet", ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
