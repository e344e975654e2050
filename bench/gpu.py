"""One command for whoever has a GPU: ``make gpu STAGE=test|bench|tune|profile``.

Runs from the source tree, installs nothing. Each stage compiles in parallel first, ends within
`LIMIT` seconds and goes on where it stopped when started again. Results land in ``$OUT`` if that is
set, else in ``bench/results/<gpu>/``: a handful of small files, ready to commit.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent import futures
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # run by path, with nothing installed

import torch  # noqa: E402

from bench import groups, measure, report, tune  # noqa: E402
from bench.suites import ATTENTION, MEMORY, SUITES, directions  # noqa: E402
from vidgen.shapes import AttentionShape  # noqa: E402

LIMIT = 520  # seconds, under nine minutes
SANITIZER_SECONDS = 160
SANITIZER_FOUND = 9  # exit status; any other says that the tool cannot watch this machine
NOTHING_LEFT = 5  # pytest's exit status when every test had passed before
PROFILED = (
    ("attention", "pyramid_768p_u15_s2_h30"),
    ("attention", "wan_1.3b_block_causal"),
    ("memory", "segment_n4-repvideo_2b"),
    ("memory", "qk_norm_rope_joint-flux_768p_u15_s2"),
)
SANITIZED = (
    AttentionShape("frames", "sanitizer", 1, 2, 64, "block_causal", (70, 200, 33, 1, 129)),
    AttentionShape("cache", "sanitizer", 2, 2, 64, "block_causal", (70, 200, 33), (1, 3)),
    AttentionShape("two_intervals", "sanitizer", 1, 2, 128, "teacher_forcing", (65, 130, 40)),
    AttentionShape("sets", "sanitizer", 1, 2, 96, "sets", (100, 1, 2, 30, 150)),
    AttentionShape("grouped", "sanitizer", 1, 4, 80, "block_causal", (150, 90), kv_heads=2),
)


def stage_test(folder: Path, rest: list[str]) -> int:
    """The GPU tests, those that have not passed yet, then the sanitizers."""
    stop = time.monotonic() + LIMIT
    environment = _environment(VIDGEN_PASSED=str(folder / "tests_passed.txt"))
    environment.pop("TRITON_INTERPRET", None)
    flags = f"-m gpu -p bench.resume -n {_workers(6)} -q -rf --tb=short"
    command = [sys.executable, "-m", "pytest", "tests", *flags.split(), *rest]
    status = _run(command, folder / "tests.log", LIMIT - SANITIZER_SECONDS, environment)
    status = 0 if status == NOTHING_LEFT else status
    return _sanitize(folder, stop) or status


def _sanitize(folder: Path, stop: float) -> int:
    """Every kernel once under memcheck and racecheck; skipped aloud where the tool is absent."""
    tool = shutil.which("compute-sanitizer")
    if not tool:
        print("compute-sanitizer: not on PATH, skipped")
        return 0
    target = [sys.executable, "bench/gpu.py", "sanitizer-target"]
    log = folder / "sanitizer.log"
    uncached = _environment(PYTORCH_NO_CUDA_MEMORY_CACHING="1")  # every tensor has its own bounds
    worst = _run(target, log, stop - time.monotonic(), uncached)  # compiles, not yet watched
    for checks_left, check in ((2, "memcheck"), (1, "racecheck")):
        command = [tool, "--tool", check, f"--error-exitcode={SANITIZER_FOUND}", *target]
        status = _run(command, log, (stop - time.monotonic()) / checks_left, uncached)
        verdict = {0: "clean", SANITIZER_FOUND: "found errors"}.get(status, "could not run here")
        print(f"compute-sanitizer {check}: {verdict} (exit status {status})")
        worst = worst or (status if status == SANITIZER_FOUND else 0)
    return worst


def sanitizer_target(folder: Path, rest: list[str]) -> int:
    """Forward and backward of every kernel on small ragged shapes."""
    for suite, specs in ((ATTENTION, SANITIZED), (MEMORY, MEMORY.sets["toy"])):
        for spec in specs:
            case = suite.make(spec, torch.bfloat16, torch.device("cuda"))
            for step in measure.make_steps(case, suite.providers["ours"].setup(case), True):
                step()
            torch.cuda.synchronize()
            print(spec.name, "done", flush=True)
    return 0


def stage_bench(folder: Path, rest: list[str]) -> int:
    """What has no results yet, the most telling shapes first."""
    stop = time.monotonic() + LIMIT
    paths = {name: folder / f"{name}.json" for name in SUITES}
    for path in paths.values():
        _bring_earlier_results(folder, path.name)
    done = {name for path in paths.values() for name in _finished(path)}
    every = [(suite.name, spec.name) for suite in SUITES.values() for spec in suite.sets["real"]]
    todo = [(suite, spec) for suite, spec in every if spec not in done]
    if not todo:
        print(f"every shape is measured: delete {' or '.join(map(str, paths.values()))}")
        return 0
    _compile_in_parallel([(s, spec) for s, spec in todo if SUITES[s].compiles], LIMIT / 3)
    left = stop - time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        new = Path(scratch) / "new.json"
        flags = f"-q -rf --benchmark-json={new} --seconds={left:.0f}"
        command = [sys.executable, "-m", "pytest", "bench", *flags.split()]
        command += [f"--skip-shapes={','.join(sorted(done))}", *rest]
        status = _run(command, folder / "bench.log", left, _environment())
        if new.exists() and new.stat().st_size:
            report.main([str(new), f"--output={folder}", "--merge"])
    done = {name for path in paths.values() for name in _finished(path)}
    n_left = sum(spec not in done for _, spec in todo)
    print(f"{len(every) - n_left} of {len(every)} shapes measured", "; run again" * bool(n_left))
    return status


def _finished(path: Path) -> set[str]:
    """Shapes with our times in every direction."""
    if not path.exists():
        return set()
    known = {spec.name: spec for suite in SUITES.values() for spec in suite.sets["real"]}
    found: dict[str, set[str]] = {}
    for group in groups.groups(json.loads(path.read_text())):
        if "postponed" not in {row["status"] for row in group.missing.values()}:
            found.setdefault(group.shape, set()).add(group.direction)
    return {shape for shape, of in found.items() if of >= set(directions(known.get(shape)))}


def _compile_in_parallel(specs: list[tuple[str, str]], seconds: float) -> None:
    """Fills the compilers' caches on disk; whatever fails here shows again where it is measured."""
    stop = time.monotonic() + seconds
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(_workers(10), context)
    jobs = [pool.submit(_compile, *spec) for spec in specs]
    try:
        for (_, spec), job in zip(specs, jobs, strict=True):
            left = max(0.0, stop - time.monotonic())
            print("compiled", spec, job.result(left), flush=True)
    except futures.TimeoutError:
        print(f"not compiled in {seconds:.0f} s: the rest compiles as it is measured")
    except Exception as error:  # a worker died
        print("compiling failed:", error)
    pool.shutdown(wait=True, cancel_futures=True)


def _compile(suite_name: str, spec_name: str) -> str:
    suite = SUITES[suite_name]
    case = suite.make(suite.find(spec_name), torch.bfloat16, torch.device("cuda"))
    notes = []
    for provider in suite.providers.values():
        if not provider.compiles:
            continue
        try:
            function = provider.setup(case)
            for backward in (False, True):
                for step in measure.make_steps(case, function, backward):
                    step()
            torch.cuda.synchronize()
        except Exception as error:
            notes.append(f"({provider.name}: {type(error).__name__})")
    del case
    torch.compiler.reset()
    torch.cuda.empty_cache()
    return " ".join(notes)


def stage_tune(folder: Path, rest: list[str]) -> int:
    _bring_earlier_results(folder, "launch_configs.json")
    path = folder / "launch_configs.json"
    return tune.main([f"--output={path}", f"--seconds={LIMIT - 60}", *rest])


def stage_profile(folder: Path, rest: list[str]) -> int:
    """A few long shapes: PyTorch's profiler, and Nsight Compute where it is installed."""
    profiler = [sys.executable, str(ROOT / "profiling" / "run.py"), f"--output={folder}", *rest]
    modes = ["torch", *["ncu"] * bool(shutil.which("ncu"))]
    runs = [(mode, *which) for mode in modes for which in PROFILED]
    statuses = [
        _run(
            [*profiler, f"--mode={mode}", f"--op={op}", f"--shape={shape}"],
            folder / "profile.log",
            LIMIT / len(runs),
            _environment(),
        )
        for mode, op, shape in runs
    ]
    return max(statuses)


STAGES = {
    "test": stage_test,
    "bench": stage_bench,
    "tune": stage_tune,
    "profile": stage_profile,
    "sanitizer-target": sanitizer_target,
}


def _run(command: list[str], log: Path, seconds: float, environment: dict[str, str]) -> int:
    """Runs with its output on the terminal and added to ``log``; 124 when it took too long."""
    print("$", *command, flush=True)
    late = threading.Event()
    with (
        log.open("a") as file,
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # so that its workers can be stopped with it
        ) as process,
    ):
        assert process.stdout

        def stop() -> None:
            late.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(max(1.0, seconds), stop)
        timer.start()
        try:
            for line in process.stdout:
                file.write(line)
                print(line, end="", flush=True)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            timer.cancel()
    if late.is_set():
        print(f"stopped after {seconds:.0f} s: run again to go on")
        return 124
    return process.returncode


def _environment(**more: str) -> dict[str, str]:
    paths = [str(ROOT / "kernels"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        **more,
    }


def _workers(at_most: int) -> int:
    return max(1, min(at_most, (os.cpu_count() or 2) - 2))


def _bring_earlier_results(folder: Path, name: str) -> None:
    """Where results go elsewhere, start from those in the tree."""
    earlier = _committed() / name
    if not (folder / name).exists() and earlier.exists():
        shutil.copyfile(earlier, folder / name)


def _committed() -> Path:
    return report.RESULTS / report.folder_name(measure.environment()["gpu"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "stage", choices=STAGES, metavar="STAGE", help="test, bench, tune or profile"
    )
    args, rest = parser.parse_known_args(argv)
    if not torch.cuda.is_available():
        print("gpu.py: error: PyTorch sees no CUDA device", file=sys.stderr)
        return 1
    folder = Path(os.environ["OUT"]) if os.environ.get("OUT") else _committed()
    folder.mkdir(parents=True, exist_ok=True)
    return STAGES[args.stage](folder, rest)


if __name__ == "__main__":
    sys.exit(main())
