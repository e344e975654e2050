"""Finds launch configurations: candidates are compiled in parallel, checked, timed.

``python bench/tune.py [--kernels fwd,dq,dkdv] [--head-dims 64,128] [--output FILE]`` on a GPU. What
was timed before is read back from FILE, so a run that is cut short goes on. It prints the rows for
``vidgen_kernels/configs.py``; the library itself never tunes at run time.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import torch

from bench import measure, providers
from bench.cases import TOLERANCE, Case
from bench.report import RESULTS, folder_name, write
from vidgen.shapes import REAL

KERNELS = ("fwd", "dq", "dkdv")

# The shape a head dim is tuned on: long, and as ragged as the models are.
SHAPES = {64: "pyramid_768p_u15_s2_h30", 96: "frames_16x1024_d96", 128: "wan_1.3b_block_causal"}
SAMPLES, FINALISTS = 15, 4


def candidates(kernel: str, head_dim: int) -> list[dict]:
    """Tiles, warps and stages worth a try; compiling finds out what does not fit the GPU."""
    rows, columns = (
        ((32, 64, 128), (64, 128)) if kernel == "dkdv" else ((64, 128, 256), (32, 64, 128))
    )
    grid = product(rows, columns, (4, 8), (2, 3))
    found = [
        dict(zip(("block_m", "block_n", "num_warps", "num_stages"), c, strict=True)) for c in grid
    ]
    # 16 rows per warp at least, and 32 KB of scores in registers at most
    return [c for c in found if c["block_m"] >= 16 * c["num_warps"] / 2 and _area(c) <= 128 * 128]


def _area(config: dict) -> int:
    return config["block_m"] * config["block_n"]


@contextmanager
def forced(kernel: str, config: dict):
    """``kernel`` launches with ``config``, the others as the library says."""
    engine = importlib.import_module("vidgen_kernels.interval_attention")
    configs = importlib.import_module("vidgen_kernels.configs")
    library = engine.lookup

    def lookup(name: str, *args):
        return configs.LaunchConfig(**config) if name == kernel else library(name, *args)

    engine.lookup = lookup
    try:
        yield
    finally:
        engine.lookup = library


def make_case(head_dim: int) -> Case:
    shape = next(s for s in REAL if s.name == SHAPES[head_dim])
    return Case.make(shape, torch.bfloat16, torch.device("cuda"))


def steps_of(case: Case, kernel: str) -> list[measure.Step]:
    attention = providers.PROVIDERS["ours"].setup(case)
    return measure.make_steps(case, attention, backward=kernel != "fwd")


def compile_one(job: tuple[str, int, dict]) -> str:
    """In a process of its own: fills Triton's cache. The reason where it does not compile."""
    kernel, head_dim, config = job
    try:
        with forced(kernel, config):
            for step in steps_of(make_case(head_dim), kernel):
                step()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    return ""


def time_one(case: Case, kernel: str, config: dict) -> dict:
    """Median milliseconds of the pass, or why the candidate is out.

    dQ and dK/dV are timed as one backward: the other kernel adds the same to every candidate.
    """
    attention = providers.PROVIDERS["ours"].setup(case)
    try:
        with forced(kernel, config):
            error = case.disagreement(attention, backward=kernel != "fwd")
            if not error <= TOLERANCE[case.dtype]:
                return {"reason": f"wrong: error {error:.1e}"}
            return {"ms": _milliseconds(steps_of(case, kernel), case.device), "max_error": error}
    except Exception as error:
        torch.cuda.empty_cache()
        return {"reason": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"}


def _milliseconds(steps: list[measure.Step], device: torch.device) -> float:
    return 1e3 * statistics.median(measure.time_steps(steps, device)[-1] for _ in range(SAMPLES))


def play_off(case: Case, kernel: str, configs: list[dict]) -> dict:
    """The finalists once more, in turns: candidates timed minutes apart met different clocks."""
    times: dict[int, list[float]] = {i: [] for i in range(len(configs))}
    steps = steps_of(case, kernel)
    for _ in range(SAMPLES):
        for i, config in enumerate(configs):
            with forced(kernel, config):
                times[i].append(measure.time_steps(steps, case.device)[-1])
    return configs[min(times, key=lambda i: statistics.median(times[i]))]


def tune(kernels: list[str], head_dims: list[int], path: Path, seconds: float) -> dict:
    """``{kernel: {head dim: {"best": ..., "timed": [...]}}}``, written as it grows."""
    stop = time.monotonic() + seconds
    major, minor = torch.cuda.get_device_capability()
    found = json.loads(path.read_text()) if path.exists() else {}
    found.update(arch=10 * major + minor, **measure.environment())
    results = found.setdefault("kernels", {})
    todo = []
    for kernel, head_dim in product(kernels, head_dims):
        entry = results.setdefault(kernel, {}).setdefault(str(head_dim), {"timed": []})
        known = [{k: v for k, v in t.items() if k in _FIELDS} for t in entry["timed"]]
        todo += [(kernel, head_dim, c) for c in candidates(kernel, head_dim) if c not in known]
    reasons = precompile(todo)
    cases = {head_dim: make_case(head_dim) for head_dim in head_dims}
    for (kernel, head_dim, config), reason in zip(todo, reasons, strict=True):
        if time.monotonic() > stop:
            print("time is up: run again to go on")
            break
        outcome = {"reason": reason} if reason else time_one(cases[head_dim], kernel, config)
        results[kernel][str(head_dim)]["timed"].append({**config, **outcome})
        print(
            kernel, head_dim, *config.values(), outcome.get("ms", outcome.get("reason")), flush=True
        )
        write(path, json.dumps(found, indent=1) + "\n")
    for kernel, head_dim in product(kernels, head_dims):
        entry = results[kernel][str(head_dim)]
        timed = sorted((t for t in entry["timed"] if "ms" in t), key=lambda t: t["ms"])
        finalists = [{k: t[k] for k in _FIELDS} for t in timed[:FINALISTS]]
        if finalists:
            entry["best"] = play_off(cases[head_dim], kernel, finalists)
    write(path, json.dumps(found, indent=1) + "\n")
    return found


_FIELDS = ("block_m", "block_n", "num_warps", "num_stages")


def precompile(jobs: list[tuple[str, int, dict]]) -> list[str]:
    """Why each job does not compile, "" where it does. All processes share Triton's cache."""
    if not jobs:
        return []
    n_workers = min(len(jobs), max(1, (os.cpu_count() or 2) - 2), 12)
    print(f"compiling {len(jobs)} candidates in {n_workers} processes", flush=True)
    with ProcessPoolExecutor(n_workers, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(compile_one, jobs))


def snippet(found: dict) -> str:
    """The rows for ``INTERVAL_ATTENTION`` in configs.py."""
    lines = []
    for kernel, by_head_dim in found["kernels"].items():
        for head_dim, entry in by_head_dim.items():
            if "best" in entry:
                numbers = ", ".join(str(entry["best"][k]) for k in _FIELDS)
                lines.append(f'("{kernel}", 16): {head_dim}: {{{found["arch"]}: C({numbers})}},')
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Sweep launch configurations on this GPU.")
    parser.add_argument("--kernels", default=",".join(KERNELS), help="default: %(default)s")
    parser.add_argument("--head-dims", default="64,128", help=f"of {', '.join(map(str, SHAPES))}")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="time no candidate after this"
    )
    parser.add_argument(
        "--output", type=Path, help="default: bench/results/<gpu>/launch_configs.json"
    )
    args = parser.parse_args(argv)
    kernels, head_dims = args.kernels.split(","), [int(d) for d in args.head_dims.split(",")]
    if unknown := [k for k in kernels if k not in KERNELS] or [
        d for d in head_dims if d not in SHAPES
    ]:
        parser.error(
            f"expected kernels of {KERNELS} and head dims of {tuple(SHAPES)}, got {unknown}"
        )
    if not torch.cuda.is_available():
        print("tune.py: error: needs a CUDA device", file=sys.stderr)
        return 1
    folder = RESULTS / folder_name(torch.cuda.get_device_name())
    found = tune(kernels, head_dims, args.output or folder / "launch_configs.json", args.seconds)
    print(snippet(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
