"""Finds launch configurations: candidates are compiled in parallel, checked, timed.

``python bench/tune.py [--only 'fwd-*,residual_norm_*'] [--output FILE]`` on a GPU. What was timed
before is read back from FILE, so a run that is cut short goes on. It prints the entries for
``vidgen_kernels/configs.py``; the library itself never tunes at run time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from concurrent import futures
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from bench import measure
from bench.cases import TOLERANCE, Case
from bench.report import RESULTS, folder_name, write
from bench.subjects import Subject, subjects

SAMPLES, FINALISTS = 15, 4


def steps_of(case: Case, subject: Subject) -> list[measure.Step]:
    function = subject.suite.providers["ours"].setup(case)
    return measure.make_steps(case, function, subject.backward)


def compile_one(job: tuple[str, Any]) -> str:
    """In a process of its own: fills Triton's cache. The reason where it does not compile."""
    name, config = job
    subject = next(s for s in subjects() if s.name == name)
    try:
        with subject.forced(config):
            for step in steps_of(subject.case(), subject):
                step()
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        return ""  # too many at once; compiled or not, one alone has room
    except Exception as error:
        return _reason(error)
    return ""


def time_one(case: Case, subject: Subject, config: Any) -> dict:
    """Median milliseconds of the pass, or why the candidate is out.

    Kernels of one backward are timed together: the others add the same to every candidate.
    """
    function = subject.suite.providers["ours"].setup(case)
    try:
        with subject.forced(config):
            error = case.disagreement(function, subject.backward)
            if not error <= TOLERANCE[case.dtype]:
                return {"reason": f"wrong: error {error:.1e}"}
            steps = steps_of(case, subject)
            times = [measure.time_steps(steps, case.device)[-1] for _ in range(SAMPLES)]
            return {"ms": 1e3 * statistics.median(times), "max_error": error}
    except Exception as error:
        torch.cuda.empty_cache()
        return {"reason": _reason(error)}


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:120]}"


def play_off(case: Case, subject: Subject, finalists: list[Any]) -> Any:
    """The finalists once more, in turns: candidates timed minutes apart met different clocks."""
    times: dict[int, list[float]] = {i: [] for i in range(len(finalists))}
    steps = steps_of(case, subject)
    for _ in range(SAMPLES):
        for i, config in enumerate(finalists):
            with subject.forced(config):
                times[i].append(measure.time_steps(steps, case.device)[-1])
    return finalists[min(times, key=lambda i: statistics.median(times[i]))]


def tune(chosen: list[Subject], path: Path, seconds: float) -> dict:
    """``{"subjects": {name: {"best": ..., "timed": [...]}}}``, written as it grows."""
    stop = time.monotonic() + seconds
    major, minor = torch.cuda.get_device_capability()
    found = json.loads(path.read_text()) if path.exists() else {}
    found.update(arch=10 * major + minor, **measure.environment())
    results = found.setdefault("subjects", {})
    todo = {}
    for subject in chosen:
        entry = results.setdefault(subject.name, {"shape": subject.shape, "timed": []})
        known = [row["config"] for row in entry["timed"]]
        todo[subject] = [c for c in subject.candidates() if asdict(c) not in known]
    jobs = [(subject.name, config) for subject, configs in todo.items() for config in configs]
    reasons = dict(zip(jobs, precompile(jobs, seconds / 2), strict=True))
    for subject, configs in todo.items():
        if not configs:
            continue
        case, entry = subject.case(), results[subject.name]
        for config in configs:
            reason = reasons[subject.name, config]
            if reason is None or time.monotonic() > stop:
                print("time is up: run again to go on")
                return found
            outcome = {"reason": reason} if reason else time_one(case, subject, config)
            entry["timed"].append({"config": asdict(config), **outcome})
            print(subject.name, config, outcome.get("ms", outcome.get("reason")), flush=True)
            write(path, json.dumps(found, indent=1) + "\n")
        best = sorted((t for t in entry["timed"] if "ms" in t), key=lambda t: t["ms"])[:FINALISTS]
        if best:
            kind = type(configs[0])
            winner = play_off(case, subject, [kind(**t["config"]) for t in best])
            entry["best"] = asdict(winner)
            entry["snippet"] = subject.snippet(winner, found["arch"])
            write(path, json.dumps(found, indent=1) + "\n")
    return found


def precompile(jobs: list[tuple[str, Any]], seconds: float) -> list[str | None]:
    """Why each job does not compile, "" where it does, None where there was no time for it.

    All processes share Triton's cache.
    """
    if not jobs:
        return []
    stop = time.monotonic() + seconds
    n_workers = min(len(jobs), max(1, (os.cpu_count() or 2) - 2), 12)
    print(f"compiling {len(jobs)} candidates in {n_workers} processes", flush=True)
    with ProcessPoolExecutor(n_workers, multiprocessing.get_context("spawn")) as pool:
        running = [pool.submit(compile_one, job) for job in jobs]
        reasons = []
        for job in running:
            try:
                left = min(stop - time.monotonic(), 24 * 3600)  # forever is too long for a wait
                reasons.append(job.result(max(0.0, left)))
            except futures.TimeoutError:
                reasons.append(None)
        pool.shutdown(wait=True, cancel_futures=True)
    return reasons


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
    found = tune(chosen, args.output or folder / "launch_configs.json", args.seconds)
    for entry in found["subjects"].values():
        print(entry.get("snippet", ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
