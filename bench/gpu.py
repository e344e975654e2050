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
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # run by path, with nothing installed

import torch  # noqa: E402

from bench import measure, providers, report, tune  # noqa: E402
from bench.cases import Case  # noqa: E402
from vidgen.shapes import REAL, AttentionShape  # noqa: E402

LIMIT = 520  # seconds, under nine minutes
LONGEST_SHAPE = 60  # seconds that the last shape to start may take
COMPILED = ("ours", "flex")
SANITIZED = (
    AttentionShape("frames", "sanitizer", 1, 2, 64, "block_causal", (70, 200, 33, 1, 129)),
    AttentionShape("cache", "sanitizer", 2, 2, 64, "block_causal", (70, 200, 33), (1, 3)),
    AttentionShape("two_intervals", "sanitizer", 1, 2, 128, "teacher_forcing", (65, 130, 40)),
    AttentionShape("sets", "sanitizer", 1, 2, 96, "sets", (100, 1, 2, 30, 150)),
    AttentionShape("grouped", "sanitizer", 1, 4, 80, "block_causal", (150, 90), kv_heads=2),
)


def stage_test(folder: Path, rest: list[str]) -> int:
    """The GPU tests, those that have not passed yet, then the sanitizers."""
    environment = _environment(VIDGEN_PASSED=str(folder / "tests_passed.txt"))
    environment.pop("TRITON_INTERPRET", None)
    pytest = [
        sys.executable,
        "-m",
        "pytest",
        str(ROOT / "tests"),
        "-m",
        "gpu",
        "-p",
        "bench.resume",
    ]
    command = [
        *pytest,
        f"--rootdir={ROOT}",
        "-n",
        str(_workers(6)),
        "-q",
        "-rf",
        "--tb=short",
        *rest,
    ]
    status = _run(command, folder / "tests.log", LIMIT - 140, environment)
    status = 0 if status == 5 else status  # 5: all had passed before
    return _sanitize(folder) or status


def _sanitize(folder: Path) -> int:
    """Every kernel once under memcheck and racecheck; skipped aloud where the tool is absent."""
    tool = shutil.which("compute-sanitizer")
    if not tool:
        print("compute-sanitizer: not on PATH, skipped")
        return 0
    target = [sys.executable, str(Path(__file__).resolve()), "sanitizer-target"]
    environment = _environment(
        PYTORCH_NO_CUDA_MEMORY_CACHING="1"
    )  # so that every tensor has its own bounds
    worst = _run(
        target, folder / "sanitizer.log", 120, environment
    )  # compiles outside the sanitizer
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", *target]
        status = _run(command, folder / f"sanitizer_{check}.log", 120, environment)
        print(f"compute-sanitizer {check}: {'clean' if status == 0 else f'exit status {status}'}")
        worst = worst or status
    return worst


def sanitizer_target(folder: Path, rest: list[str]) -> int:
    """Forward and backward of every kernel on small ragged shapes."""
    for shape in SANITIZED:
        case = Case.make(shape, torch.bfloat16, torch.device("cuda"))
        for step in measure.make_steps(
            case, providers.PROVIDERS["ours"].setup(case), backward=True
        ):
            step()
        torch.cuda.synchronize()
        print(shape.name, "done", flush=True)
    return 0


def stage_bench(folder: Path, rest: list[str]) -> int:
    """The shapes that have no results yet, most telling ones first."""
    start = time.monotonic()
    _bring_earlier_results(folder, "attention.json")
    todo = [shape for shape in REAL if shape.name not in _finished(folder / "attention.json")]
    if not todo:
        print("every shape is measured: delete attention.json to start over")
        return 0
    _compile_in_parallel(todo, seconds=LIMIT / 3)
    done = ",".join(shape.name for shape in REAL if shape not in todo)
    seconds = LIMIT - LONGEST_SHAPE - (time.monotonic() - start)
    results = folder / ".new.json"
    pytest = [sys.executable, "-m", "pytest", str(ROOT / "bench"), f"--benchmark-json={results}"]
    filters = [
        f"--rootdir={ROOT}",
        f"--seconds={seconds:.0f}",
        f"--skip-shapes={done}",
        "-q",
        "-rf",
    ]
    status = _run([*pytest, *filters, *rest], folder / "bench.log", LIMIT, _environment())
    if results.exists() and results.stat().st_size:
        report.main([str(results), f"--output={folder}", "--merge"])
        results.unlink()
    left = [shape.name for shape in todo if shape.name not in _finished(folder / "attention.json")]
    print(
        f"{len(REAL) - len(left)} of {len(REAL)} shapes measured" + ("; run again" if left else "")
    )
    return status


def _finished(path: Path) -> set[str]:
    """Shapes with our times in every direction."""
    if not path.exists():
        return set()
    found = report.groups(json.loads(path.read_text()))
    directions: dict[str, set[str]] = {}
    for group in found:
        if "postponed" not in {row["status"] for row in group.missing.values()}:
            directions.setdefault(group.shape, set()).add(group.direction)
    return {shape for shape, of in directions.items() if of == set(report.DIRECTIONS)}


def _compile_in_parallel(shapes: list[AttentionShape], seconds: float) -> None:
    """Fills the compilers' caches on disk; whatever fails here shows again where it is measured."""
    stop = time.monotonic() + seconds
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(_workers(10), context)
    jobs = [pool.submit(_compile_shape, shape) for shape in shapes]
    for shape, job in zip(shapes, jobs, strict=True):
        try:
            print(
                "compiled",
                shape.name,
                job.result(timeout=max(0, stop - time.monotonic())),
                flush=True,
            )
        except TimeoutError:
            print(
                f"compiling takes longer than {seconds:.0f} s: the rest compiles as it is measured"
            )
            break
        except Exception as error:  # a worker died
            print("compiling failed:", error)
            break
    pool.shutdown(wait=True, cancel_futures=True)


def _compile_shape(shape: AttentionShape) -> str:
    case = Case.make(shape, torch.bfloat16, torch.device("cuda"))
    notes = []
    for name in COMPILED:
        try:
            attention = providers.PROVIDERS[name].setup(case)
            for backward in (False, True):
                for step in measure.make_steps(case, attention, backward):
                    step()
            torch.cuda.synchronize()
        except Exception as error:
            notes.append(f"({name}: {type(error).__name__})")
    del case
    torch.compiler.reset()
    torch.cuda.empty_cache()
    return " ".join(notes)


def stage_tune(folder: Path, rest: list[str]) -> int:
    _bring_earlier_results(folder, "launch_configs.json")
    path = folder / "launch_configs.json"
    return tune.main([f"--output={path}", f"--seconds={LIMIT - 60}", *rest])


def stage_profile(folder: Path, rest: list[str]) -> int:
    """Whatever `profiling/run.py` can read on this machine."""
    profiler = ROOT / "profiling" / "run.py"
    if not profiler.exists():
        print(f"{profiler}: not there")
        return 1
    command = [sys.executable, str(profiler), f"--output={folder}", *rest]
    return _run(command, folder / "profile.log", LIMIT, _environment())


STAGES = {
    "test": stage_test,
    "bench": stage_bench,
    "tune": stage_tune,
    "profile": stage_profile,
    "sanitizer-target": sanitizer_target,
}


def _run(command: list[str], log: Path, seconds: float, environment: dict[str, str]) -> int:
    """Runs with its output on the terminal and in ``log``; 124 when it took too long."""
    print("$", *command, flush=True)
    with (
        log.open("w") as file,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        ) as process,
    ):
        assert process.stdout
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        for line in process.stdout:
            file.write(line)
            print(line, end="", flush=True)
        timer.cancel()
    if process.returncode == -9:
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
