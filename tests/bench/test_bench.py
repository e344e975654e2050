"""The benchmarks keep their contract: honest gate, complete results, reports and clear errors."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.attention import curves
from bench.attention import providers as attention_providers
from bench.gpu import stages as gpu
from bench.gpu import subjects
from bench.measure import timing as measure
from bench.memory.calls import MemoryCall
from bench.memory.registry import CASES, MemoryCase
from bench.report import groups, report
from bench.report.groups import exponent
from bench.suites import ATTENTION, MEMORY, SUITES
from tests.paths import ROOT
from vidgen import cli
from vidgen.commands import bench as bench_command
from vidgen.common.installation import EXTRAS, source_environment
from vidgen.ops import FUSED
from vidgen.shapes import REAL, TOY, nova_sets, pyramid_blocks
from vidgen_kernels.attention import interval_attention as engine
from vidgen_kernels.attention.configs import LaunchConfig, lookup
from vidgen_kernels.common.configs import RowConfig
from vidgen_kernels.latents import blocks
from vidgen_kernels.latents.configs import ELEMENTWISE
from vidgen_kernels.norms.configs import ROW_WISE as NORMS
from vidgen_kernels.rope.configs import ROW_WISE as ROPE

pytestmark = pytest.mark.portable_only

CPU = torch.device("cpu")
CONTRACT = {
    *("op", "shape", "dtype", "direction", "provider", "median_ms", "model"),
    *("peak_memory_mb", "max_error", "gpu", "commit", "torch", "triton"),
}
DENSE, EAGER = ATTENTION.providers["sdpa_dense"], MEMORY.providers["eager"]


# ---- shapes


def test_shapes_follow_the_models_formulas() -> None:
    assert pyramid_blocks(240, 15, 2) == (128 + 240, *[240] * 12, 960, 3840, 3840)
    assert (sum(nova_sets(1440)), len(nova_sets(1440)), max(nova_sets(1440))) == (1440, 63, 36)
    assert (len(nova_sets(4096)), max(nova_sets(4096))) == (64, 101)
    density = {s.name: round(s.density, 3) for s in REAL}
    assert density["pyramid_768p_u15_s2_h30"] == 0.611
    assert density["nova_temporal_train"] == 0.558


def test_shape_names_are_unique() -> None:
    names = [name for suite in SUITES.values() for name in suite.names]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("shape", TOY, ids=lambda s: s.name)
def test_visible_pairs_are_those_of_the_mask(shape) -> None:
    case = ATTENTION.make(shape, torch.float32, CPU)
    assert int(case.dense_mask().sum()) == shape.visible_pairs


@pytest.mark.parametrize("case", CASES["reduced"], ids=lambda c: c.name)
def test_floors_are_the_tensors_that_a_call_reads_and_writes(case: MemoryCase) -> None:
    """What forward reads and writes, counted; vectors and positions make the small difference."""
    with FakeTensorMode(), torch.no_grad():
        inputs = case.inputs(torch.bfloat16, "cpu")
        outputs = case.call(FUSED, inputs)
    # older entries are for the backward, which sums them again
    read = [x for name, x in inputs.items() if not (name.startswith("older") and "total" in inputs)]
    n_bytes = sum(x.nbytes for x in read)
    for x in outputs:  # v of a single stream stays where it is
        is_view = any(x.untyped_storage()._cdata == y.untyped_storage()._cdata for y in read)
        n_bytes += -x.nbytes if is_view else x.nbytes
    assert n_bytes == pytest.approx(case.floor(torch.bfloat16).fwd, rel=0.01)


# ---- the gate


def off_by_one_key(case):
    """A provider whose every query sees one key too few or too many."""
    mask = case.dense_mask()
    mask[:, -1] = ~mask[:, -1]
    return lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)


def wrong_gradient(case):
    right = DENSE.setup(case)
    return lambda q, k, v: right(q, k, v.detach() + 0.9 * (v - v.detach()))


def raises(case):
    raise RuntimeError("this peer broke\nand says more")


@pytest.mark.parametrize("setup", [off_by_one_key, wrong_gradient])
@pytest.mark.parametrize("shape", [s for s in TOY if not s.is_full], ids=lambda s: s.name)
def test_a_wrong_provider_is_reported_as_wrong(shape, setup) -> None:
    planted = dataclasses.replace(DENSE, name="planted", setup=setup)
    case = ATTENTION.make(shape, torch.float64, CPU)
    outcomes = measure.measure_group(case, True, [DENSE, planted], once=True)
    assert outcomes["sdpa_dense"].status == "measured"
    assert outcomes["planted"].status == "wrong"
    assert not outcomes["planted"].samples


def perturbed(call: MemoryCall):
    """The right outputs but for one element."""
    right = EAGER.setup(call)

    def function(*leaves):
        first, *others = measure.as_tuple(right(*leaves))
        bump = torch.zeros(first.shape, dtype=first.dtype)
        bump.view(-1)[-1] = 1e-2
        return first + bump, *others

    return function


def without_a_gradient(call: MemoryCall):
    """Most of the gradient of the first input is lost."""
    right = EAGER.setup(call)
    return lambda x, *others: right(x.detach() + 0.1 * (x - x.detach()), *others)


PLANTED_IN = ("segment_n4", "qk_norm_rope", "renoise_drawn", "dpm_step")


@pytest.mark.parametrize("setup", [perturbed, without_a_gradient])
@pytest.mark.parametrize("spec", [c for c in CASES["toy"] if c.variant in PLANTED_IN])
def test_a_wrong_memory_provider_is_reported_as_wrong(spec: MemoryCase, setup) -> None:
    planted = dataclasses.replace(EAGER, name="planted", setup=setup)
    case = MEMORY.make(spec, torch.float64, CPU)
    outcomes = measure.measure_group(case, True, [EAGER, planted], once=True)
    assert outcomes["eager"].status == "measured", outcomes["eager"].reason
    assert outcomes["planted"].status == "wrong"


@pytest.mark.parametrize("spec", CASES["toy"], ids=lambda s: s.name)
def test_providers_agree_on_memory_cases(spec: MemoryCase) -> None:
    case = MEMORY.make(spec, torch.float32, CPU)
    chosen = [MEMORY.providers[name] for name in ("ours", "eager", "official")]
    for backward in (False, True):
        outcomes = measure.measure_group(case, backward, chosen, once=True)
        assert {o.status for o in outcomes.values()} <= {"measured", "unavailable"}, outcomes
        assert outcomes["ours"].samples


def test_a_provider_that_raises_is_a_result() -> None:
    planted = dataclasses.replace(DENSE, name="planted", setup=raises)
    case = ATTENTION.make(TOY[0], torch.float32, CPU)
    outcomes = measure.measure_group(case, False, [DENSE, planted], once=True)
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
    # pytest-benchmark measures nothing in what it takes for a worker of pytest-xdist
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
            assert ("fraction_of_peak" in info) == (unit in measure.RATES)
            assert info["median_ms"] == pytest.approx(1e3 * benchmark["stats"]["median"])
            assert 0 < info["max_error"] < 1e-4
        missing = [row for row in results["not_measured"] if row["shape"] == shape]
        assert {row["provider"] for row in missing} == absent
        assert all(row["reason"] for row in missing)
    assert "node" not in results["machine_info"]


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


PAGES = ("README.md", "report.html")


def test_report_is_generated_from_results(tmp_path: Path, capsys) -> None:
    path = tmp_path / "new.json"
    path.write_text(json.dumps(invented_results()))
    assert report.main([str(path), "--output", str(tmp_path / "cpu")]) == 0
    assert "flash_attn_per_block, unavailable: not installed (all)" in capsys.readouterr().out
    files = {p.name for p in (tmp_path / "cpu").iterdir()}
    assert files == {"attention.json", "attention_peak.png", "attention_speedup.png", *PAGES}
    text = (tmp_path / "cpu" / "README.md").read_text()
    assert "reduced set" in text
    # a wrong provider has no time; the noisy baseline is marked
    assert "| frames | 2 | 0.1 | 50% | 3 | 1e-06 | ~2.50x | WRONG |" in text
    html = (tmp_path / "cpu" / "report.html").read_text()
    assert html.count('<img src="data:image/png;base64,') == 2  # and nothing from elsewhere
    assert not re.search(r'(src|href)="(?!data:)', html)
    assert '<span class="faster">~2.50x</span>' in html and 'class="wrong">WRONG<' in html


def test_memory_report_has_bandwidth_and_its_own_files(tmp_path: Path) -> None:
    results = invented_results()
    for row in [b["extra_info"] for b in results["benchmarks"]] + results["not_measured"]:
        row.update(op="mix", shape="mix_n4-rows")
        row["provider"] = row["provider"].replace("sdpa_dense", "eager")
        row["gbps"] = 1e3 * row.pop("tflops", 0)
    path = tmp_path / "new.json"
    path.write_text(json.dumps(results))
    assert report.main([str(path), "--output", str(tmp_path / "cpu")]) == 0
    files = {p.name for p in (tmp_path / "cpu").iterdir()}
    assert files == {"memory.json", "memory_peak.png", "memory_speedup.png", *PAGES}
    text = (tmp_path / "cpu" / "README.md").read_text()
    assert "| mix_n4-rows | 2 | 100 | 50% | 3 | 1e-06 | ~2.50x | WRONG |" in text
    assert "fp32: 200 GB/s" in text and "Mask creation" not in text


def test_report_of_scaling_fits_exponents(tmp_path: Path) -> None:
    results = invented_results()
    (ours, _), results["benchmarks"] = results["benchmarks"], []
    for x, median_ms in ((2, 4.0), (4, 16.0), (8, 64.0)):
        more = {"op": "scaling", "shape": f"frames_{x}", "curve": "frames", "x": x}
        info = {**ours["extra_info"], **more, "median_ms": median_ms}
        results["benchmarks"].append({**ours, "extra_info": info})
    results["not_measured"] = []
    path = tmp_path / "new.json"
    path.write_text(json.dumps(results))
    assert report.main([str(path), "--output", str(tmp_path / "cpu")]) == 0
    assert {p.name for p in (tmp_path / "cpu").glob("*.png")} >= {"scaling_curves.png"}
    assert "| frames | fp32 | fwd | 2.00 |" in (tmp_path / "cpu" / "README.md").read_text()


def test_exponents_of_powers() -> None:
    sizes = [1, 2, 5, 30]
    assert exponent(sizes, [3 * x**1.5 for x in sizes]) == pytest.approx(1.5)
    assert exponent([4], [1.0]) is None
    assert [p.x for p in curves.POINTS["real"] if p.curve == curves.TOKENS][-1] == 131072
    for point in curves.POINTS["real"]:
        if point.curve == curves.CACHED:
            assert point.shape.is_full and point.shape.n_keys == point.x * point.shape.n_queries


def test_natten_takes_equal_frames_only() -> None:
    shapes = {shape.name: shape for shape in ATTENTION.sets["real"]}
    device = torch.device("meta")

    def refuses(name: str, dtype: torch.dtype = torch.bfloat16) -> str | None:
        case = SimpleNamespace(shape=shapes[name], dtype=dtype, device=device)
        return attention_providers.natten_refuses(case, True)

    assert refuses("wan_14b_block_causal") is None
    assert "float16" in refuses("wan_14b_block_causal", torch.float32)
    for name in ("wan_14b_teacher_forcing", "nova_cache_step8", "nova_temporal_train"):
        assert "frames of one size" in refuses(name)
    assert attention_providers.near_square(1560) == (39, 40)
    assert attention_providers.near_square(7) == (1, 7)


def test_comparing_results_finds_what_regressed(tmp_path: Path, capfd) -> None:
    before, after = invented_results(), invented_results()
    files = tmp_path / "before.json", tmp_path / "after.json"

    def compared() -> tuple[int, str]:
        for path, results in zip(files, (before, after), strict=True):
            path.write_text(json.dumps(results))
        status = cli.main(["bench", "--compare", *map(str, files)])
        return status, capfd.readouterr().out

    ours, dense = after["benchmarks"]
    assert compared() == (0, "no change beyond noise\nours: 0 slower, 0 faster, of 1\n")
    ours["extra_info"]["median_ms"] = 2.08  # below the smallest that counts
    dense["extra_info"]["median_ms"] = 5.9  # within its spread of 20 %
    assert compared()[0] == 0
    dense["extra_info"]["median_ms"] = 9.0  # a peer of another version is no regression
    status, text = compared()
    assert status == 0 and "+80%" in text
    ours["extra_info"]["median_ms"] = 2.4
    status, text = compared()
    assert status == 1 and "+20%" in text and "ours: 1 slower" in text
    ours["extra_info"]["median_ms"] = 1.0
    status, text = compared()
    assert status == 0 and "-50%" in text and "1 faster" in text
    after["benchmarks"] = [dense]
    after["not_measured"].append({**ours["extra_info"], "status": "wrong", "reason": "error 1"})
    status, text = compared()
    assert status == 1 and "no longer measured: attention, frames, fp32, fwd, ours" in text


def test_comparing_what_is_no_result(tmp_path: Path, capfd) -> None:
    path = tmp_path / "a.json"
    for text, message in (
        (None, "expected a results file"),
        ("{", "expected JSON"),
        ("[]", "expected results of"),
        ('{"benchmarks": []}', "expected results with common rows"),
    ):
        if text is not None:
            path.write_text(text)
        assert cli.main(["bench", "--compare", str(path), str(path)]) == 2
        assert message in capfd.readouterr().err


def test_a_shape_is_finished_when_all_directions_are_there(tmp_path: Path) -> None:
    results = invented_results()
    path = tmp_path / "attention.json"
    path.write_text(json.dumps(results))
    assert gpu._finished(path) == set()
    rows = [b for b in results["benchmarks"] if b["extra_info"]["provider"] == "ours"]
    for direction in ("bwd", "fwd+bwd"):
        results["benchmarks"] += [
            {**row, "extra_info": {**row["extra_info"], "direction": direction}} for row in rows
        ]
    path.write_text(json.dumps(results))
    assert gpu._finished(path) == {"frames"}


def test_merging_replaces_what_was_measured_again() -> None:
    results = invented_results()
    first = results["benchmarks"][0]
    merged = groups.merge(results, {**results, "benchmarks": [first], "not_measured": []})
    assert len(merged["benchmarks"]) == 2
    failed = {k: first["extra_info"][k] for k in groups.KEY} | {"status": "failed", "reason": "-"}
    merged = groups.merge(results, {**results, "benchmarks": [], "not_measured": [failed]})
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
    assert capsys.readouterr().err.endswith("--help\n")  # where the usage is


def test_bench_outside_the_source_tree_says_where_to_get_it(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(bench_command, "BENCH", tmp_path / "absent")
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


# ---- tuning


def test_tuning_forces_one_kernel_only() -> None:
    known = {subject.name: subject for subject in subjects.subjects()}
    subject = known["fwd-64"]
    config = subject.candidates()[0]
    args = (64, torch.bfloat16, 90)
    dq = engine.lookup("dq", *args)
    with subject.forced(config):
        assert engine.lookup("fwd", *args) == config
        assert engine.lookup("dq", *args) == dq
    assert engine.lookup is lookup
    pixels = known["pixel_blocks_fwd"]
    with pixels.forced(pixels.candidates()[-1]):
        assert blocks.lookup_pixel_blocks(torch.bfloat16, 90) == pixels.candidates()[-1]


def test_every_table_can_be_tuned() -> None:
    known = subjects.subjects()
    assert {s.kernel for s in known} >= {*NORMS, *ROPE, *ELEMENTWISE}
    assert len({s.name for s in known}) == len(known)
    assert all(s.shape in s.suite.names and s.candidates() for s in known)


def test_tuning_prints_entries_for_the_configs() -> None:
    known = {subject.name: subject for subject in subjects.subjects()}
    snippet = known["fwd-64"].snippet(LaunchConfig(128, 64, 8, 3, 64), 90)
    assert snippet == 'attention/configs.py: ("fwd", 16): {64: {90: C(128, 64, 8, 3, 64)}},'
    snippet = known["residual_norm_fwd-2048"].snippet(RowConfig(1, 8, 4), 90)
    assert snippet == 'norms/configs.py: "residual_norm_fwd": {2048: {90: R(1, 8, 4)}},'
