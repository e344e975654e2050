"""Reports are made from results: tables, files, pages, and what changed between two results."""

import json
import re
from pathlib import Path

import pytest

from bench.report import groups, report, terminal
from bench.suites import SAMPLERS
from vidgen import cli

pytestmark = pytest.mark.portable_only

PAGES = {"README.md", "report.html"}
OF_ATTENTION = {"tflops": 0.1, "fraction_of_peak": 0.5, "mask_ms": 0.1, "density": 0.5}


def invented(op: str = "attention", other: str = "sdpa_dense", **numbers: float) -> dict:
    """Results of one shape: ours takes 2 ms, ``other`` 5 ms and is noisy.

    One peer is absent, one is wrong. ``numbers`` are those of the suite.
    """
    labels = {"op": op, "shape": "frames", "dtype": "fp32", "direction": "fwd"}
    common = {"peak_memory_mb": 3.0, "max_error": 1e-6, "commit": "abc", "gpu": "cpu"}
    common |= numbers or OF_ATTENTION
    benchmarks = [
        {
            "stats": {"median": ms / 1e3, "iqr": spread * ms / 1e3},
            "extra_info": {**labels, **common, "provider": provider, "median_ms": ms},
        }
        for provider, ms, spread in (("ours", 2.0, 0.01), (other, 5.0, 0.2))
    ]
    absent = {"provider": "liger", "status": "unavailable", "reason": "not installed"}
    wrong = {"provider": "planted", "status": "wrong", "reason": "error 1e-01"}
    return {
        "benchmarks": benchmarks,
        "not_measured": [{**labels, **absent}, {**labels, **wrong}],
        "machine_info": {"gpu": "cpu", "torch": "2", "triton": "3"},
        "datetime": "2000-01-01T00:00:00",
    }


def reported(results: dict, folder: Path) -> str:
    """The README; all files are in ``folder / "cpu"``."""
    path = folder / "new.json"
    path.write_text(json.dumps(results))
    assert report.main([str(path), "--output", str(folder / "cpu")]) == 0
    return (folder / "cpu" / "README.md").read_text()


def files(folder: Path) -> set[str]:
    return {path.name for path in (folder / "cpu").iterdir()}


# ---- a report


def test_report_is_generated_from_results(tmp_path: Path, capsys) -> None:
    text = reported(invented(), tmp_path)
    assert "liger, unavailable: not installed (all)" in capsys.readouterr().out
    assert files(tmp_path) == {
        *("attention.json", "attention_peak.png", "attention_speedup.png"),
        *PAGES,
    }
    assert "reduced set" in text
    # a wrong provider has no time; the noisy baseline is marked
    assert "| frames | 2 | 0.1 | 50% | 3 | 1e-06 | ~2.50x | WRONG |" in text
    html = (tmp_path / "cpu" / "report.html").read_text()
    assert html.count('<img src="data:image/png;base64,') == 2  # and nothing from elsewhere
    assert not re.search(r'(src|href)="(?!data:)', html)
    assert '<span class="faster">~2.50x</span>' in html and 'class="wrong">WRONG<' in html


def test_memory_report_has_bandwidth_and_its_own_files(tmp_path: Path) -> None:
    text = reported(invented("mix", "eager", gbps=100.0, fraction_of_peak=0.5), tmp_path)
    assert files(tmp_path) == {"memory.json", "memory_peak.png", "memory_speedup.png", *PAGES}
    assert "| frames | 2 | 100 | 50% | 3 | 1e-06 | ~2.50x | WRONG |" in text
    assert "fp32: 200 GB/s" in text and "Mask creation" not in text


def test_report_of_scaling_fits_exponents(tmp_path: Path) -> None:
    results = invented()
    (ours, _), results["benchmarks"] = results["benchmarks"], []
    for x, median_ms in ((2, 4.0), (4, 16.0), (8, 64.0)):
        more = {"op": "scaling", "shape": f"frames_{x}", "curve": "frames", "x": x}
        info = {**ours["extra_info"], **more, "median_ms": median_ms}
        results["benchmarks"].append({**ours, "extra_info": info})
    results["not_measured"] = []
    assert "| frames | fp32 | fwd | 2.00 |" in reported(results, tmp_path)
    assert "scaling_curves.png" in files(tmp_path)


def test_exponents_of_powers() -> None:
    sizes = [1, 2, 5, 30]
    assert groups.exponent(sizes, [3 * x**1.5 for x in sizes]) == pytest.approx(1.5)
    assert groups.exponent([4], [1.0]) is None


def test_report_of_models_has_no_peak(tmp_path: Path) -> None:
    text = reported(invented("model", "eager", tokens_per_s=1000.0), tmp_path)
    assert files(tmp_path) == {"models.json", "models_speedup.png", *PAGES}
    assert "| shape | ours, ms/step | tokens/s | MB | error | vs eager | vs planted |" in text
    assert "| frames | 2 | 1000 | 3 | 1e-06 | ~2.50x | WRONG |" in text
    assert "peak" not in text


def test_report_of_samplers_says_what_is_projected(tmp_path: Path) -> None:
    """2 ms for a tenth of a video are 0.02 s for all of it."""
    part = invented("sampler", "eager", videos_per_hour=180000.0, measured_share=0.1)
    text = reported(part, tmp_path)
    assert "samplers.json" in files(tmp_path)
    assert "| shape | ours, s/video | videos/h | MB | error | vs eager | vs planted |" in text
    assert "| frames (projected from 10%) | 0.02 | 180000 | 3 | 1e-06 | ~2.50x | WRONG |" in text
    assert "peak" not in text
    whole = invented("sampler", "eager", videos_per_hour=1.8e6, measured_share=1.0)
    assert "| frames | 0.002 | 1800000 |" in reported(whole, tmp_path)


def test_ours_in_another_way_is_no_peer(tmp_path: Path) -> None:
    found = invented("sampler", "ours_cached", videos_per_hour=180000.0, measured_share=0.1)
    text = reported(found, tmp_path)
    assert "| error | ours cached, s/video | vs planted |" in text
    assert "| 1e-06 | 0.05 | WRONG |" in text


def test_a_row_without_ours_says_why(tmp_path: Path) -> None:
    results = invented()
    ours = results["benchmarks"].pop(0)["extra_info"]
    results["not_measured"].append({**ours, "status": "failed", "reason": "out of memory"})
    assert "| frames | failed | - | - | - | - | - | - |" in reported(results, tmp_path)


def test_samplers_are_groups_of_their_own() -> None:
    results = invented("sampler", "eager", videos_per_hour=1.0, measured_share=0.5)
    (group,) = groups.groups(results)
    assert group.suite is groups.SAMPLERS and SAMPLERS.names
    assert group.suite.duration(group.rows["ours"]) == 0.004


def test_merging_replaces_what_was_measured_again() -> None:
    results = invented()
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
    assert [terminal.coloured(cell) for cell in cells] == coloured


# ---- two results


def test_comparing_results_finds_what_regressed(tmp_path: Path, capfd) -> None:
    before, after = invented(), invented()
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
