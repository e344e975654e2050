"""One command for whoever has a GPU: ``make gpu STAGE=test|bench|tune|profile``.

It runs from the source tree and installs nothing. A stage compiles in parallel first, ends within
`LIMIT` seconds, and goes on where it stopped when it is started again. Results are written as they
come to ``bench/results/<gpu>/``, ready to commit. If ``$OUT`` is set, they go there instead, as at
most eight small files; copy them to ``bench/results/<gpu>/`` for the next call to go on from, and
file ``bench.json`` with ``python bench/report/report.py bench.json --merge``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # run by path, with nothing installed

import torch  # noqa: E402
from rich.console import Console  # noqa: E402

from bench.gpu import tune  # noqa: E402
from bench.measure import timing  # noqa: E402
from bench.measure.failures import LOST  # noqa: E402
from bench.measure.workers import in_parallel  # noqa: E402
from bench.report import groups, report  # noqa: E402
from bench.report.files import RESULTS, folder_name, write  # noqa: E402
from bench.report.terminal import print_report  # noqa: E402
from bench.suites import ATTENTION, MEMORY, SUITES, directions  # noqa: E402
from vidgen.shapes import AttentionShape  # noqa: E402

LIMIT = 520  # seconds, under nine minutes
SANITIZER_SECONDS = 160
SANITIZER_FOUND = 9  # exit status; any other failure means that the tool does not work here
NOTHING_LEFT = 5  # pytest's exit status when every test had passed before
ROUND = 45  # with fewer seconds left, nothing is started again after a crash
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
    """Runs the GPU tests that have not passed yet, then the sanitizers."""
    stop = time.monotonic() + LIMIT
    passed = folder / "tests_passed.txt"
    _bring_earlier_results(folder, passed.name)
    _forget_other_sources(passed)
    environment = _environment(VIDGEN_PASSED=str(passed))
    environment.pop("TRITON_INTERPRET", None)
    # Warnings of other packages are no reason to fail here.
    flags = f"-m gpu -p bench.gpu.resume -n {_workers(6)} --max-worker-restart=50 -W default"
    flags += " -q -rfEs --tb=short -o faulthandler_timeout=120"
    command = [sys.executable, "-m", "pytest", "tests", *flags.split(), *rest]
    status = _run(command, folder / "tests.log", LIMIT - SANITIZER_SECONDS, environment)
    status = 0 if status == NOTHING_LEFT else status
    return _sanitize(folder, stop) or status


def _forget_other_sources(passed: Path) -> None:
    """Empties the list after a change of the sources; its first line says which they were."""
    digest = hashlib.sha256()
    for name in ("bench", "kernels", "tests", "vidgen"):
        for path in sorted((ROOT / name).rglob("*.py")):
            digest.update(path.read_bytes())
    line = f"# sources {digest.hexdigest()[:16]}\n"
    if not passed.exists() or not passed.read_text().startswith(line):
        write(passed, line)


def _sanitize(folder: Path, stop: float) -> int:
    """Runs every kernel once under memcheck and racecheck; says so where the tool is absent."""
    tool = shutil.which("compute-sanitizer")
    if not tool:
        print("compute-sanitizer: not on PATH, skipped")
        return 0
    target = [sys.executable, "bench/gpu/stages.py", "sanitizer-target"]
    log = folder / "sanitizer.log"
    uncached = _environment(PYTORCH_NO_CUDA_MEMORY_CACHING="1")  # an allocation for each tensor
    worst = _run(target, log, stop - time.monotonic(), uncached)  # compiles, without the tool
    for checks_left, check in ((2, "memcheck"), (1, "racecheck")):
        command = [tool, "--tool", check, f"--error-exitcode={SANITIZER_FOUND}", *target]
        status = _run(command, log, (stop - time.monotonic()) / checks_left, uncached)
        verdict = {0: "clean", SANITIZER_FOUND: "found errors"}.get(status, "could not run here")
        print(f"compute-sanitizer {check}: {verdict} (exit status {status})")
        worst = worst or (status if status == SANITIZER_FOUND else 0)
    return worst


def sanitizer_target(folder: Path, rest: list[str]) -> int:
    """Runs forward and backward of every kernel on small ragged shapes."""
    for suite, specs in ((ATTENTION, SANITIZED), (MEMORY, MEMORY.sets["toy"])):
        for spec in specs:
            case = suite.make(spec, torch.bfloat16, torch.device("cuda"))
            for step in timing.make_steps(case, suite.providers["ours"].setup(case), True):
                step()
            torch.cuda.synchronize()
            print(spec.name, "done", flush=True)
    return 0


def stage_bench(folder: Path, rest: list[str]) -> int:
    """Measures what has no results yet, all suites in turns, the most important shapes first.

    A provider that loses the GPU's context, or a shape that ends the process, is left out, and the
    others are started again.
    """
    stop = time.monotonic() + LIMIT
    is_filed = folder == _committed()
    kept = folder / ("bench.partial" if is_filed else "bench.json")
    every = _chosen_specs(rest)
    todo = [(suite, spec) for suite, spec in every if spec not in _done(kept)]
    if not todo:
        print(f"every shape is measured: delete its results in {_committed()}")
        return 0
    _compile_in_parallel([(s, spec) for s, spec in todo if SUITES[s].compiles], LIMIT / 3)
    crashing: set[str] = set()  # shapes
    deselected: set[str] = set()  # tests
    worst = 0
    while (left := stop - time.monotonic()) > ROUND:
        flags = f"-q -rf --keep={kept} --seconds={left:.0f}".split()
        flags += [f"--skip-shapes={','.join(sorted(_done(kept) | crashing))}"]
        flags += [f"--deselect={test}" for test in sorted(deselected)]
        command = [sys.executable, "-m", "pytest", "bench", *flags, *rest]
        status = _run(command, folder / "bench.log", left, _environment())
        worst = worst or (0 if status == NOTHING_LEFT else status)
        results = json.loads(kept.read_text()) if kept.exists() else {}
        found = {results.get("measuring", "")} - {""} - crashing if status < 0 else set()
        lost = _tests_that_lost_the_gpu(results) - deselected
        if not found and not lost:
            break
        print("left out from here on:", *sorted(found | lost), flush=True)
        crashing |= found
        deselected |= lost
    n_left = sum(spec not in _done(kept) for _, spec in todo)
    if kept.exists():
        _report(kept, folder if is_filed else None)
    print(f"{len(every) - n_left} of {len(every)} shapes measured", "; run again" * bool(n_left))
    return worst


def _chosen_specs(rest: list[str]) -> list[tuple[str, str]]:
    """Suites and real shapes that --shapes asks for, by name, in the order of measuring."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--shapes", default="*")
    patterns = parser.parse_known_args(rest)[0].shapes.split(",")
    every = [
        (i, suite.name, spec.name)
        for suite in SUITES.values()
        for i, spec in enumerate(suite.sets["real"])
        if any(fnmatch(spec.name, pattern) for pattern in patterns)
    ]
    return [(suite, spec) for _, suite, spec in sorted(every, key=lambda x: x[0])]


def _done(kept: Path) -> set[str]:
    """Shapes that are measured already, in filed results or in ``kept``."""
    paths = [*(_committed() / f"{name}.json" for name in SUITES), kept]
    return {name for path in paths for name in _finished(path)}


def _tests_that_lost_the_gpu(results: dict) -> set[str]:
    """The names that pytest has for the providers that lost the GPU's context."""
    rows = (
        row
        for row in results.get("not_measured", [])
        if row["status"] == "failed" and row["reason"].startswith(LOST)
    )
    found = set()
    for row in rows:
        name = groups.BY_OP.get(row["op"], groups.MEMORY).name
        case = "-".join(row[key] for key in ("shape", "dtype", "direction", "provider"))
        found.add(f"bench/bench_{name}.py::test_{name}[{case}]")
    return found


def _report(kept: Path, folder: Path | None) -> None:
    """Prints tables, and files the results in ``folder`` if there is one."""
    if folder:
        report.main([str(kept), f"--output={folder}", "--merge"])
        kept.unlink()
    elif found := groups.groups(json.loads(kept.read_text())):
        print_report(found, Console(width=140))


def _finished(path: Path) -> set[str]:
    """Shapes that were measured in every direction, and not postponed."""
    if not path.exists():
        return set()
    known = {spec.name: spec for suite in SUITES.values() for spec in suite.sets["real"]}
    found: dict[str, set[str]] = {}
    for group in groups.groups(json.loads(path.read_text())):
        if "postponed" not in {row["status"] for row in group.missing.values()}:
            found.setdefault(group.shape, set()).add(group.direction)
    return {shape for shape, of in found.items() if of >= set(directions(known.get(shape)))}


def _compile_in_parallel(specs: list[tuple[str, str]], seconds: float) -> None:
    """Fills the compilers' caches on disk; what fails here fails again when it is measured."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    n_compiled = 0
    for (_, spec), notes in in_parallel(_compile, specs, _workers(10), seconds):
        n_compiled += 1
        print("compiled", spec, notes, flush=True)
    if n_compiled < len(specs):
        print(f"{n_compiled} of {len(specs)} compiled: the rest compiles as it is measured")


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
                for step in timing.make_steps(case, function, backward):
                    step()
            torch.cuda.synchronize()
        except Exception as error:
            notes.append(f"({provider.name}: {type(error).__name__})")
            timing.clear_after_failure()
    del case
    torch.compiler.reset()
    torch.cuda.empty_cache()
    return " ".join(notes)


def stage_tune(folder: Path, rest: list[str]) -> int:
    """Times the candidates that were not timed yet; one that ends the process is not tried again.

    The configurations that it prints and writes are entries for the families' `configs.py`.
    """
    stop = time.monotonic() + LIMIT
    path = folder / "launch_configs.json"
    _bring_earlier_results(folder, path.name)
    status = tune.CONTEXT_LOST
    while (left := stop - time.monotonic()) > ROUND and (status == tune.CONTEXT_LOST or status < 0):
        command = [sys.executable, "bench/gpu/tune.py", f"--output={path}", *rest]
        command += [f"--seconds={left - ROUND:.0f}"]
        status = _run(command, folder / "tune.log", left, _environment())
    return status


def stage_profile(folder: Path, rest: list[str]) -> int:
    """Profiles a few long shapes with PyTorch's profiler, and with Nsight Compute if present."""
    stop = time.monotonic() + LIMIT
    modes = ["torch", *["ncu"] * bool(shutil.which("ncu"))]
    if "ncu" not in modes:
        print("ncu: not on PATH, skipped")
    runs = [(mode, *which) for mode in modes for which in PROFILED]
    statuses = []
    for n_before, (mode, op, shape) in enumerate(runs):
        with tempfile.TemporaryDirectory() as scratch:
            arguments = [f"--mode={mode}", f"--op={op}", f"--shape={shape}", f"--output={scratch}"]
            command = [sys.executable, "profiling/run.py", *arguments, *rest]
            seconds = (stop - time.monotonic()) / (len(runs) - n_before)
            statuses.append(_run(command, folder / "profile.log", seconds, _environment()))
            _keep_profile(Path(scratch), folder)
    return next((status for status in statuses if status), 0)


def _keep_profile(scratch: Path, folder: Path) -> None:
    """Keeps Nsight's large reports as they are, and puts tables and traces into one file."""
    for path in sorted(scratch.iterdir()):
        if path.suffix == ".ncu-rep":
            shutil.copyfile(path, folder / path.name)
            continue
        with zipfile.ZipFile(folder / "profile.zip", "a", zipfile.ZIP_DEFLATED) as archive:
            if path.name not in archive.namelist():
                archive.write(path, path.name)


STAGES = {
    "test": stage_test,
    "bench": stage_bench,
    "tune": stage_tune,
    "profile": stage_profile,
    "sanitizer-target": sanitizer_target,
}


def _run(command: list[str], log: Path, seconds: float, environment: dict[str, str]) -> int:
    """The exit status of a command, 124 when it took too long; its output also goes to ``log``."""
    print("$", *command, flush=True)
    late = threading.Event()
    with (
        log.open("a", buffering=1) as file,  # by lines, as this process may be stopped, too
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
    """Copies committed results to a ``folder`` elsewhere, to go on from."""
    earlier = _committed() / name
    if not (folder / name).exists() and earlier.exists():
        write(folder / name, earlier.read_text())


def _committed() -> Path:
    return RESULTS / folder_name(timing.environment()["gpu"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "stage", choices=STAGES, metavar="STAGE", help="test, bench, tune or profile"
    )
    args, rest = parser.parse_known_args(argv)
    if not torch.cuda.is_available():
        print("stages.py: error: PyTorch sees no CUDA device", file=sys.stderr)
        return 1
    folder = Path(os.environ["OUT"]) if os.environ.get("OUT") else _committed()
    folder.mkdir(parents=True, exist_ok=True)
    return STAGES[args.stage](folder, rest)


if __name__ == "__main__":
    sys.exit(main())
