"""`vidgen bench` keeps its contract: complete results, and errors that say what to do."""

import json
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from bench.measure import timing
from bench.report import groups
from tests.paths import ROOT
from vidgen import cli
from vidgen.commands import bench
from vidgen.common.installation import EXTRAS, source_environment

pytestmark = pytest.mark.portable_only

CONTRACT = {
    *("op", "shape", "dtype", "direction", "provider", "median_ms", "model"),
    *("peak_memory_mb", "max_error", "gpu", "commit", "torch", "triton"),
}


def test_results_keep_the_contract(tmp_path: Path) -> None:
    """Measured by pytest itself on toy shapes, as a user would."""
    expected = {  # shape: providers, their unit, those that are not here
        "toy_frames": ({"ours", "sdpa_dense"}, "tflops", {"flash_attn_per_block"}),
        "segment_n4-toy": ({"ours", "eager"}, "gbps", {"liger"}),
        "flux_train_toy": ({"ours", "eager"}, "tokens_per_s", set()),
    }
    path = tmp_path / "results.json"
    names = {name for here, _, absent in expected.values() for name in here | absent}
    chosen = [f"--shapes={','.join(expected)}", f"--providers={','.join(names)}"]
    command = [sys.executable, "-m", "pytest", "bench/", "-q", f"--benchmark-json={path}"]
    command += ["--shape-set=toy", *chosen]
    # pytest-benchmark measures nothing in a worker of pytest-xdist
    kept = {k: v for k, v in source_environment().items() if not k.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(path.read_text())
    for shape, (here, unit, absent) in expected.items():
        of_shape = [b for b in results["benchmarks"] if b["extra_info"]["shape"] == shape]
        keys = {(b["extra_info"]["provider"], b["extra_info"]["direction"]) for b in of_shape}
        assert keys == {(p, d) for p in here for d in groups.DIRECTIONS}
        for benchmark in of_shape:
            info = benchmark["extra_info"]
            assert set(info) >= {*CONTRACT, unit}
            assert ("fraction_of_peak" in info) == (unit in timing.RATES)
            assert info["median_ms"] == pytest.approx(1e3 * benchmark["stats"]["median"])
            assert 0 < info["max_error"] < 1e-4
        missing = [row for row in results["not_measured"] if row["shape"] == shape]
        assert {row["provider"] for row in missing} == absent
        assert all(row["reason"] for row in missing)
    assert "node" not in results["machine_info"]


@pytest.mark.parametrize("command", ["", "bench", "info"])
def test_every_command_has_help(command: str, capsys) -> None:
    with pytest.raises(SystemExit) as exited:
        cli.main([*command.split(), "--help"])
    assert exited.value.code == 0
    assert "usage: vidgen" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["walk"], ["bench", "--walk"], ["bench", "walking"]])
def test_bad_arguments_exit_with_2(argv: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as exited:
        cli.main(argv)
    assert exited.value.code == 2
    assert capsys.readouterr().err.endswith("--help\n")  # where the usage is


def test_bench_outside_the_source_tree_says_where_to_get_it(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(bench, "BENCH", tmp_path / "absent")
    assert cli.main(["bench", "attention"]) == 1
    assert "get the source" in capsys.readouterr().err


def test_bench_names_the_missing_extra(monkeypatch, capsys) -> None:
    monkeypatch.setitem(EXTRAS, "bench", ("no_such_module",))
    assert cli.main(["bench"]) == 1
    assert "pip install 'vidgen-kernels[bench]'" in capsys.readouterr().err


def test_bench_names_the_shapes_when_none_matches(capsys) -> None:
    assert cli.main(["bench", "--shapes", "no_such_shape", "--shape-set", "toy"]) == 1
    assert "toy_frames" in capsys.readouterr().err


def test_help_needs_neither_torch_nor_an_extra() -> None:
    code = "import sys, vidgen.cli as c\ntry: c.main(['--help'])\nfinally: assert 'torch' not in "
    code += "sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- scripts that are run by path


SCRIPTS = [p for p in sorted((ROOT / "bench").rglob("*.py")) if "__main__" in p.read_text()]


@pytest.mark.parametrize("folder", sorted({p.parent for p in SCRIPTS}), ids=lambda p: p.name)
def test_nothing_beside_a_script_hides_a_package(folder: Path) -> None:
    """Python looks for every import in the script's own folder first."""
    known = {*sys.stdlib_module_names, *packages_distributions()}
    assert not known & {path.stem for path in folder.iterdir()}
