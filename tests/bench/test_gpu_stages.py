"""Nothing is lost on a rented GPU when a worker dies or a run is cut short."""

import importlib
import json
import multiprocessing
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.gpu import stages, subjects, tune
from bench.measure import timing, workers
from bench.measure.failures import LOST, ContextLost
from bench.report import groups
from bench.report.files import write
from bench.suites import ATTENTION
from tests.paths import ROOT
from vidgen.common.installation import source_environment
from vidgen.shapes import TOY
from vidgen_kernels.latents import configs

pytestmark = pytest.mark.portable_only

ROW = {"op": "attention", "shape": "toy_frames", "dtype": "bf16", "direction": "fwd"}


def environment() -> dict[str, str]:
    """Hides pytest-xdist: pytest-benchmark measures nothing in a worker of it."""
    return {k: v for k, v in source_environment().items() if not k.startswith("PYTEST_")}


# ---- processes that die


OBEY = """
import os, time
from bench.measure.failures import LOST, ContextLost

def obey(what, name):
    if what == "die":
        os._exit(7)
    if what == "raise":
        raise ValueError("not this one\\nand more")
    if what == "lose the GPU":
        raise ContextLost(LOST)
    if what == "hang":
        time.sleep(1000)
    return f"{name} done"
"""


@pytest.fixture
def obey(monkeypatch, tmp_path: Path):
    """A function in a module that is quick to import."""
    (tmp_path / "obedient.py").write_text(OBEY)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("obedient").obey
    del sys.modules["obedient"]


def test_a_worker_that_dies_is_reported_and_the_others_go_on(obey) -> None:
    jobs = [("do", "a"), ("die", "b"), ("raise", "c"), ("lose the GPU", "d"), ("do", "e")]
    assert dict(workers.in_parallel(obey, jobs, n_workers=1)) == {
        ("do", "a"): "a done",
        ("die", "b"): "the process died: 7",
        ("raise", "c"): "ValueError: not this one",
        ("lose the GPU", "d"): LOST,
        ("do", "e"): "e done",
    }


def test_what_takes_too_long_is_stopped(obey) -> None:
    """One that is let run gives a result."""
    assert not list(workers.in_parallel(obey, [("hang", "a"), ("do", "b")], 1, seconds=0.1))
    assert not multiprocessing.active_children()


# ---- a provider that loses the GPU's context


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The context of a GPU, which is lost when a test says so."""
    state = SimpleNamespace(lost=False)

    def synchronize() -> None:
        if state.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "empty_cache", synchronize)
    return state


def test_only_the_provider_that_lost_the_context_is_blamed(context: SimpleNamespace) -> None:
    def lose(case):
        context.lost = True
        timing.torch.cuda.synchronize()

    dense = ATTENTION.providers["sdpa_dense"]
    named = [
        ("before", dense.setup),
        ("raises", lambda case: 1 / 0),
        ("loses", lose),
        ("after", dense.setup),
    ]
    providers = [
        type(dense)(name=name, summary="", setup=setup)  # type: ignore[arg-type]
        for name, setup in named
    ]
    case = ATTENTION.make(TOY[0], torch.float32, torch.device("cpu"))
    found = timing.measure_group(case, False, providers, once=True)
    assert {name: outcome.status for name, outcome in found.items()} == {
        "before": "postponed",
        "raises": "failed",
        "loses": "failed",
        "after": "postponed",
    }
    assert found["raises"].reason.startswith("ZeroDivisionError")
    assert found["loses"].reason.startswith(LOST)


def test_a_provider_that_lost_the_context_is_left_out_of_a_new_start() -> None:
    def row(provider: str, status: str, reason: str, **more) -> dict:
        return {**ROW, "provider": provider, "status": status, "reason": reason, **more}

    lost = f"{LOST}: RuntimeError: CUDA error"
    rows = [
        row("flex", "failed", lost),
        row("eager", "failed", lost, op="segment", shape="segment_n4-toy"),
        row("ours", "postponed", LOST),
        row("natten", "failed", "out of memory"),
    ]
    found = stages._tests_that_lost_the_gpu({"not_measured": rows})
    assert found == {
        "bench/bench_attention.py::test_attention[toy_frames-bf16-fwd-flex]",
        "bench/bench_memory.py::test_memory[segment_n4-toy-bf16-fwd-eager]",
    }
    assert stages._tests_that_lost_the_gpu({}) == set()


# ---- results that grow


def test_results_are_kept_as_they_come(tmp_path: Path) -> None:
    """All suites in turns, joined to the results of an earlier run, without deselected tests."""
    path = tmp_path / "kept.json"
    earlier = {**ROW, "provider": "eager", "status": "failed", "reason": "earlier"}
    path.write_text(json.dumps({"benchmarks": [], "not_measured": [earlier], "measuring": "x"}))
    shapes = ("toy_frames", "toy_cache", "segment_n1-toy")
    case = "bench/bench_attention.py::test_attention[toy_cache-fp32-fwd-sdpa_dense]"
    arguments = f"bench -q --shape-set=toy --shapes={','.join(shapes)} --keep={path}".split()
    arguments += [
        "--providers=ours,sdpa_dense,liger",
        f"--deselect={case}",
        "-p",
        "no:cacheprovider",
    ]
    command = [sys.executable, "-m", "pytest", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(path.read_text())
    measured = [b["extra_info"] for b in results["benchmarks"]]
    order = list(dict.fromkeys(row["shape"] for row in measured))
    assert order == ["toy_frames", "segment_n1-toy", "toy_cache"]
    of_case = {(r["direction"], r["provider"]) for r in measured if r["shape"] == "toy_cache"}
    assert of_case == {(d, p) for d in groups.DIRECTIONS for p in ("ours", "sdpa_dense")} - {
        ("fwd", "sdpa_dense")
    }
    assert earlier in results["not_measured"] and "measuring" not in results
    assert {r["provider"] for r in results["not_measured"]} == {"eager", "liger"}


def test_shapes_are_taken_from_every_suite_in_turns() -> None:
    chosen = stages._chosen_specs(["--shapes=wan_*,segment_n[14]-repvideo_2b", "--providers=ours"])
    assert chosen[:2] == [
        ("attention", "wan_14b_block_causal"),
        ("memory", "segment_n1-repvideo_2b"),
    ]
    assert len(chosen) == 6
    assert {suite for suite, _ in stages._chosen_specs([])[:5]} == set(stages.SUITES)


def test_a_shape_is_finished_when_all_directions_are_there(tmp_path: Path) -> None:
    path, stats = tmp_path / "attention.json", {"median": 1.0, "iqr": 0.0}
    rows = [
        {"stats": stats, "extra_info": {**ROW, "direction": direction, "provider": "ours"}}
        for direction in groups.DIRECTIONS
    ]
    for n, finished in ((1, set()), (3, {"toy_frames"})):
        path.write_text(json.dumps({"benchmarks": rows[:n]}))
        assert stages._finished(path) == finished


def test_what_passed_before_a_change_runs_again(tmp_path: Path) -> None:
    passed = tmp_path / "tests_passed.txt"
    stages._forget_other_sources(passed)
    header = passed.read_text()
    with passed.open("a") as file:
        file.write("tests/gpu/test_attention.py::test_autocast\n")
    stages._forget_other_sources(passed)
    assert passed.read_text() == f"{header}tests/gpu/test_attention.py::test_autocast\n"
    passed.write_text("# sources 0\ntests/gpu/test_attention.py::test_autocast\n")
    stages._forget_other_sources(passed)
    assert passed.read_text() == header


def test_profiles_are_a_handful_of_files(tmp_path: Path) -> None:
    folder, scratch = tmp_path / "out", tmp_path / "scratch"
    folder.mkdir()
    scratch.mkdir()
    for shape in ("a", "b"):
        for suffix in ("txt", "json.gz", "ncu-rep"):
            (scratch / f"{shape}.{suffix}").write_text(shape)
        stages._keep_profile(scratch, folder)
    assert sorted(p.name for p in folder.iterdir()) == ["a.ncu-rep", "b.ncu-rep", "profile.zip"]
    with zipfile.ZipFile(folder / "profile.zip") as archive:
        assert sorted(archive.namelist()) == ["a.json.gz", "a.txt", "b.json.gz", "b.txt"]


def test_a_process_that_takes_too_long_is_stopped_and_its_output_kept(tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = "import time; print('begun', flush=True); time.sleep(1000)"
    assert stages._run([sys.executable, "-c", script], log, 1.0, stages._environment()) == 124
    assert log.read_text() == "begun\n"


# ---- tests on a machine without all packages


def test_files_whose_packages_are_absent_are_skipped(tmp_path: Path) -> None:
    """Otherwise pytest would not run the other files."""
    (tmp_path / "test_absent.py").write_text("import no_such_package\n")
    (tmp_path / "test_broken.py").write_text("1 / 0\n")
    (tmp_path / "test_fine.py").write_text("def test_it(): pass\n")
    passed = tmp_path / "passed.txt"
    flags = ["-p", "bench.gpu.resume", "-q", "-rs", "--continue-on-collection-errors"]
    command = [sys.executable, "-m", "pytest", *flags, "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**environment(), "VIDGEN_PASSED": str(passed)},
        capture_output=True,
        text=True,
    )
    assert "test_absent.py: No module named 'no_such_package'" in done.stdout, done.stdout
    assert "1 passed, 1 skipped, 1 error" in done.stdout
    assert passed.read_text() == "test_fine.py::test_it\n"


LOSING = """
import pytest
from bench.measure import timing

lost = []
timing.context_is_lost = lambda: bool(lost)

@pytest.mark.parametrize("i", range(6))
def test_it(i):
    if i == 1:
        lost.append(i)
    assert not lost
"""


def test_a_worker_that_lost_the_context_is_replaced(tmp_path: Path) -> None:
    """It fails one test and ends at the next; a new worker passes the others."""
    (tmp_path / "test_losing.py").write_text(LOSING)
    passed = tmp_path / "passed.txt"
    flags = [
        "-p",
        "bench.gpu.resume",
        "-n",
        "1",
        "--max-worker-restart=50",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *flags, str(tmp_path)],
        cwd=tmp_path,
        env={**environment(), "VIDGEN_PASSED": str(passed)},
        capture_output=True,
        text=True,
    )
    assert "2 failed, 4 passed" in done.stdout, done.stdout + done.stderr
    noted = passed.read_text().splitlines()
    assert sorted(noted) == [f"test_losing.py::test_it[{i}]" for i in (0, 3, 4, 5)]


# ---- tuning that is cut short


def tuned(monkeypatch, path: Path, time_one, reasons: dict | None = None) -> dict:
    """The table after `tune.tune` with three candidates of one kernel and invented times."""
    subject = next(s for s in subjects.subjects() if s.name == "linear_step_fwd")
    candidates = subject.candidates()[:3]
    monkeypatch.setattr(subjects.Subject, "candidates", lambda self: candidates)
    monkeypatch.setattr(subjects.Subject, "case", lambda self: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(tune, "precompile", lambda jobs, s: {j: "" for j in jobs} | (reasons or {}))
    monkeypatch.setattr(tune, "time_one", lambda case, subject, config: time_one(config))
    monkeypatch.setattr(tune, "play_off", lambda case, subject, finalists: finalists[0])
    tune.tune([subject], path, 60.0)
    return json.loads(path.read_text())["subjects"]["linear_step_fwd"]


def test_tuning_goes_on_after_a_candidate_that_lost_the_context(
    monkeypatch, tmp_path: Path, context: SimpleNamespace
) -> None:
    path = tmp_path / "launch_configs.json"
    times = iter([{"ms": 2.0}, {"reason": "RuntimeError: CUDA error"}, {"ms": 1.0}])

    def time_one(config: configs.BlockConfig) -> dict:
        outcome = next(times)
        context.lost = "reason" in outcome
        return outcome

    monkeypatch.setattr(timing, "environment", lambda: {})
    with pytest.raises(ContextLost):
        tuned(monkeypatch, path, time_one)
    context.lost = False
    entry = tuned(monkeypatch, path, time_one)
    assert [row.get("ms") for row in entry["timed"]] == [2.0, None, 1.0]
    assert entry["best"] == entry["timed"][2]["config"]


def test_tuning_leaves_out_the_candidate_that_ended_the_process(
    monkeypatch, tmp_path: Path
) -> None:
    path = tmp_path / "launch_configs.json"

    def die(config) -> dict:
        raise KeyboardInterrupt  # stands for the end of the process

    with pytest.raises(KeyboardInterrupt):
        tuned(monkeypatch, path, die)
    entry = tuned(monkeypatch, path, lambda config: {"ms": 1.0})
    assert [row.get("ms") for row in entry["timed"]] == [None, 1.0, 1.0]
    assert entry["timed"][0]["reason"] == tune.UNFINISHED


def test_tuning_that_was_cut_before_the_play_off_still_has_one(monkeypatch, tmp_path: Path) -> None:
    path = tmp_path / "launch_configs.json"
    tuned(monkeypatch, path, lambda config: {"ms": 1.0})
    found = json.loads(path.read_text())
    del found["subjects"]["linear_step_fwd"]["best"]
    write(path, json.dumps(found))
    assert "best" in tuned(monkeypatch, path, lambda config: pytest.fail("timed again"))
