"""The benchmarks keep their contract: honest gate, complete results, reports and clear errors."""

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import measure, providers, report, tune
from bench.cases import Case
from vidgen import cli
from vidgen.shapes import REAL, REDUCED, TOY, nova_sets, pyramid_blocks

pytestmark = pytest.mark.portable_only

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
CONTRACT = {
    *("op", "shape", "dtype", "direction", "provider", "median_ms", "tflops", "fraction_of_peak"),
    *("peak_memory_mb", "max_error", "gpu", "commit", "torch", "triton"),
}
DENSE = providers.PROVIDERS["sdpa_dense"]


# ---- shapes


def test_shapes_follow_the_models_formulas() -> None:
    assert pyramid_blocks(240, 15, 2) == (128 + 240, *[240] * 12, 960, 3840, 3840)
    assert (sum(nova_sets(1440)), len(nova_sets(1440)), max(nova_sets(1440))) == (1440, 63, 36)
    assert (len(nova_sets(4096)), max(nova_sets(4096))) == (64, 101)
    density = {s.name: round(s.density, 3) for s in REAL}
    assert density["pyramid_768p_u15_s2_h30"] == 0.611
    assert density["nova_temporal_train"] == 0.558


def test_shape_names_are_unique() -> None:
    names = [shape.name for shape in (*REAL, *REDUCED, *TOY)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("shape", TOY, ids=lambda s: s.name)
def test_visible_pairs_are_those_of_the_mask(shape) -> None:
    case = Case.make(shape, torch.float32, CPU)
    assert int(case.dense_mask().sum()) == shape.visible_pairs


# ---- the gate


def off_by_one_key(case: Case):
    """A provider whose every query sees one key too few or too many."""
    mask = case.dense_mask()
    mask[:, -1] = ~mask[:, -1]
    return lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)


def wrong_gradient(case: Case):
    right = DENSE.setup(case)
    return lambda q, k, v: right(q, k, v.detach() + 0.9 * (v - v.detach()))


def raises(case: Case):
    raise RuntimeError("this peer broke\nand says more")


@pytest.mark.parametrize("setup", [off_by_one_key, wrong_gradient])
@pytest.mark.parametrize("shape", [s for s in TOY if not s.is_full], ids=lambda s: s.name)
def test_a_wrong_provider_is_reported_as_wrong(shape, setup) -> None:
    planted = dataclasses.replace(DENSE, name="planted", setup=setup)
    outcomes = measure.measure_group(shape, torch.float64, True, [DENSE, planted], CPU, once=True)
    assert outcomes["sdpa_dense"].status == "measured"
    assert outcomes["planted"].status == "wrong"
    assert not outcomes["planted"].samples


def test_a_provider_that_raises_is_a_result() -> None:
    planted = dataclasses.replace(DENSE, name="planted", setup=raises)
    outcomes = measure.measure_group(TOY[0], torch.float32, False, [DENSE, planted], CPU, once=True)
    assert outcomes["planted"].status == "failed"
    assert outcomes["planted"].reason == "RuntimeError: this peer broke"
    assert set(outcomes["sdpa_dense"].samples) == {"fwd"}


def test_peak_memory_of_a_cpu_call() -> None:
    held = []

    def allocate() -> None:
        held.append(torch.empty(1 << 20))
        held.append(torch.empty(1 << 20))
        held.clear()

    assert measure.peak_memory([allocate, allocate], CPU) == 2 * 4 << 20


# ---- results


def test_results_keep_the_contract(tmp_path: Path) -> None:
    """Measured by pytest itself on a toy shape, as a user would."""
    path = tmp_path / "results.json"
    chosen = [
        "--shape-set=toy",
        "--shapes=toy_frames",
        "--providers=ours,sdpa_dense,flash_attn_per_block",
    ]
    command = [sys.executable, "-m", "pytest", "bench/", "-q", f"--benchmark-json={path}", *chosen]
    # pytest-benchmark measures nothing in what it takes for a worker of pytest-xdist
    kept = {k: v for k, v in cli._source_environment().items() if not k.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(path.read_text())

    infos = [benchmark["extra_info"] for benchmark in results["benchmarks"]]
    keys = {(info["provider"], info["direction"]) for info in infos}
    assert keys == {(p, d) for p in ("ours", "sdpa_dense") for d in report.DIRECTIONS}
    for benchmark, info in zip(results["benchmarks"], infos, strict=True):
        assert set(info) >= CONTRACT
        assert info["median_ms"] == pytest.approx(1e3 * benchmark["stats"]["median"])
        assert 0 < info["max_error"] < 1e-5
    assert "node" not in results["machine_info"]
    assert {row["provider"] for row in results["not_measured"]} == {"flash_attn_per_block"}
    assert all(row["reason"] for row in results["not_measured"])


def invented_results() -> dict:
    """Ours takes 2 ms and the dense mask 5 ms; one peer is absent, one is wrong."""
    labels = {"op": "attention", "shape": "frames", "dtype": "fp32", "direction": "fwd"}
    numbers = {
        **{"tflops": 0.1, "fraction_of_peak": 0.5, "peak_memory_mb": 3.0, "max_error": 1e-6},
        **{"mask_ms": 0.1, "density": 0.5, "commit": "abc", "gpu": "cpu"},
    }
    benchmarks = [
        {
            "stats": {"median": ms / 1e3, "iqr": spread * ms / 1e3},
            "extra_info": {**labels, **numbers, "provider": provider, "median_ms": ms},
        }
        for provider, ms, spread in (("ours", 2.0, 0.01), ("sdpa_dense", 5.0, 0.2))
    ]
    absent = {
        "provider": "flash_attn_per_block",
        "status": "unavailable",
        "reason": "not installed",
    }
    wrong = {"provider": "planted", "status": "wrong", "reason": "error 1e-01"}
    return {
        "benchmarks": benchmarks,
        "not_measured": [{**labels, **absent}, {**labels, **wrong}],
        "machine_info": {"gpu": "cpu", "torch": "2", "triton": "3"},
        "datetime": "2000-01-01T00:00:00",
    }


def test_report_is_generated_from_results(tmp_path: Path, capsys) -> None:
    path = tmp_path / "new.json"
    path.write_text(json.dumps(invented_results()))
    assert report.main([str(path), "--output", str(tmp_path / "cpu")]) == 0
    assert "flash_attn_per_block, unavailable: not installed (all)" in capsys.readouterr().out
    files = {p.name for p in (tmp_path / "cpu").iterdir()}
    assert files == {"README.md", "attention.json", "attention_peak.png", "attention_speedup.png"}
    text = (tmp_path / "cpu" / "README.md").read_text()
    assert "reduced set" in text
    # a wrong provider has no time; the noisy baseline is marked
    assert "| frames | 2 | 0.1 | 50% | 3 | 1e-06 | ~2.50x | WRONG |" in text


def test_merging_replaces_what_was_measured_again() -> None:
    results = invented_results()
    first = results["benchmarks"][0]
    merged = report.merge(results, {**results, "benchmarks": [first], "not_measured": []})
    assert len(merged["benchmarks"]) == 2
    failed = {k: first["extra_info"][k] for k in report.KEY} | {"status": "failed", "reason": "-"}
    merged = report.merge(results, {**results, "benchmarks": [], "not_measured": [failed]})
    assert [b["extra_info"]["provider"] for b in merged["benchmarks"]] == ["sdpa_dense"]
    assert len(merged["not_measured"]) == 3


def test_only_speedups_are_coloured() -> None:
    cells = ["nova_sets_1024px", "~1.04x", "0.99x", "no memory"]
    coloured = ["nova_sets_1024px", "[green]~1.04x[/]", "[red]0.99x[/]", "no memory"]
    assert [report._coloured(cell) for cell in cells] == coloured


# ---- the command line


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
    assert "usage:" in capsys.readouterr().err


def test_bench_outside_the_source_tree_says_where_to_get_it(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(cli, "BENCH", tmp_path / "absent")
    assert cli.main(["bench", "attention"]) == 1
    assert "get the source" in capsys.readouterr().err


def test_bench_names_the_missing_extra(monkeypatch, capsys) -> None:
    monkeypatch.setitem(cli.EXTRAS, "bench", ("no_such_module",))
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


# ---- tuning


def test_tuning_forces_one_kernel_only() -> None:
    engine = importlib.import_module("vidgen_kernels.interval_attention")
    config = tune.candidates("fwd", 64)[0]
    args = (64, torch.bfloat16, 90)
    dq = engine.lookup("dq", *args)
    with tune.forced("fwd", config):
        assert engine.lookup("fwd", *args).kwargs()["BLOCK_M"] == config["block_m"]
        assert engine.lookup("dq", *args) == dq
    assert engine.lookup.__module__ == "vidgen_kernels.configs"


def test_tuning_prints_rows_for_the_configs() -> None:
    best = {"block_m": 128, "block_n": 64, "num_warps": 8, "num_stages": 3}
    found = {"arch": 90, "kernels": {"fwd": {"64": {"best": best, "timed": []}}}}
    assert tune.snippet(found) == '("fwd", 16): 64: {90: C(128, 64, 8, 3)},'
