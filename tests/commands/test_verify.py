"""`vidgen verify` passes what it should, and notices what is wrong."""

import argparse
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from tests.paths import GOLDEN
from vidgen import cli
from vidgen.commands import verify
from vidgen_kernels.common.launch import is_interpreted

CASES = GOLDEN / "nova"
BUILT = ["set_attention_a", "set_attention_b"]


def run(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, list[str]]:
    """The exit status and the lines after the header."""
    parser = argparse.ArgumentParser()
    verify.add_arguments(parser)
    status = verify.run(parser.parse_args(arguments))
    header, *lines = capsys.readouterr().out.splitlines() or [""]
    assert not header or header.startswith("path: " + verify.path_taken())
    return status, lines


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the set attention cases under names that say nothing."""
    for i, name in enumerate(BUILT):
        for ending in (".json", ".safetensors"):
            shutil.copy(CASES / f"{name}{ending}", tmp_path / f"{i}{ending}")
    return tmp_path


def change(folder: Path, name: str, edit) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "0.safetensors"
    tensors = load_file(path)
    tensors[name] = edit(tensors[name])
    save_file(tensors, path)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("ops", ["eager", "fused"])
def test_set_attention_passes(folder: Path, ops: str, dtype: str, capsys) -> None:
    status, lines = run(capsys, "--golden", str(folder), "--ops", ops, "--dtype", dtype)
    assert [x.split()[:2] for x in lines[:-1]] == [["PASS", "nova/0"], ["PASS", "nova/1"]]
    assert all(float(x.split()[2]) <= float(x.split()[3]) for x in lines[:-1])
    assert (status, lines[-1]) == (0, "2 passed, 0 failed, 0 skipped")


# What takes minutes interpreted and says nothing of a kernel that its steps do not.
WHOLE_LOOPS = re.compile(r"loop|pipe|t2v|i2v|vae")
REPOSITORY = list(verify.find_cases(verify.GOLDEN))


@pytest.mark.parametrize("case", REPOSITORY, ids=lambda case: f"{case.model}-{case.path.stem}")
def test_case_of_the_repository(case: verify.Case) -> None:
    if is_interpreted() and WHOLE_LOOPS.search(case.kind):
        pytest.skip("a whole loop or a VAE: the portable run has it")
    for ops in ("fused",) if is_interpreted() else verify.OPS:
        outcome = verify.check(case, ops, torch.float32, "cpu")
        assert outcome.status == "PASS", f"{ops}: {outcome}"


def test_no_case_of_the_repository_is_left_out() -> None:
    assert len(REPOSITORY) > 50
    assert all(case.kind in verify.KINDS[case.model] for case in REPOSITORY)


OUTPUTS = ["o", "lse", "grad_q", "grad_k", "grad_v", "y", "grad_x", "o_perm", "mask", "rank_perm"]


@pytest.mark.parametrize("name", OUTPUTS)
def test_one_wrong_number_fails(folder: Path, name: str, capsys) -> None:
    def wrong(x: torch.Tensor) -> torch.Tensor:
        x.view(-1)[-1] += 0.01 if x.is_floating_point() else 1
        return x

    change(folder, f"out.{name}", wrong)
    status, lines = run(capsys, "--golden", str(folder))
    assert status == 1 and lines[-1] == "1 passed, 1 failed, 0 skipped"
    assert lines[0].startswith("FAIL nova/0") and lines[0].endswith(f"worst of {name}")


def test_nan_and_unreadable_files_fail(folder: Path, capsys) -> None:
    change(folder, "in.q", lambda x: x * float("nan"))
    (folder / "1.safetensors").write_bytes(b"not tensors")
    status, lines = run(capsys, "--golden", str(folder))
    assert (status, lines[-1]) == (1, "0 passed, 2 failed, 0 skipped")


def test_outputs_that_nothing_computes_fail(folder: Path, capsys) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "0.safetensors"
    save_file({**load_file(path), "out.surprise": torch.ones(1)}, path)
    status, lines = run(capsys, "--golden", str(folder))
    assert status == 1 and "surprise" in lines[0]


PYRAMID = CASES.parent / "pyramid_flow"


@pytest.mark.portable_only  # the model passes of the interpreter take long
def test_padding_is_not_compared(tmp_path: Path, capsys) -> None:
    """Whatever a case holds for padded text rows; any other row counts."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(PYRAMID / "flux_forward.safetensors")
    shutil.copy(PYRAMID / "flux_forward.json", tmp_path / "0.json")
    n_text = int(tensors["in.text_mask"][0].sum())
    for row, expected in ((n_text, "PASS"), (n_text - 1, "FAIL")):
        tensors["out.u4_s2.block0.text"][:, row] = 99.0
        save_file(tensors, tmp_path / "0.safetensors")
        _, lines = run(capsys, "--golden", str(tmp_path))
        assert lines[0].startswith(expected)
        assert expected == "PASS" or lines[0].endswith("worst of u4_s2.block0.text")


@pytest.mark.parametrize("change", ["none", "number", "missing", "more"])
def test_tables_are_compared_as_a_whole(tmp_path: Path, change: str, capsys) -> None:
    case = json.loads((PYRAMID / "history_layout.json").read_text())
    clips = case["tables"][0]["units"][3]["history_per_stage"]["2"]
    if change == "number":
        clips[1]["res"] = 0
    elif change == "missing":
        clips.append({"res": 2, "frames": [3]})
    elif change == "more":
        clips.pop()
    (tmp_path / "case.json").write_text(json.dumps(case))
    status, lines = run(capsys, "--golden", str(tmp_path))
    assert lines[0].startswith("PASS" if change == "none" else "FAIL") and status == (
        change != "none"
    )


def test_unknown_kinds_are_skipped_with_a_reason(folder: Path, capsys) -> None:
    path = folder / "0.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "kind": "time_travel"}))
    status, lines = run(capsys, "--golden", str(folder))
    assert (status, lines[-1]) == (0, "1 passed, 0 failed, 1 skipped")
    assert lines[0] == "SKIP nova/0 - - not built yet: nova time_travel"


def test_the_folder_may_come_from_the_environment(folder: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("VIDGEN_GOLDEN", str(folder))
    assert run(capsys)[1][-1] == "2 passed, 0 failed, 0 skipped"


def test_no_cases_is_an_error(tmp_path: Path, capsys) -> None:
    assert run(capsys, "--golden", str(tmp_path))[0] == 1


@pytest.mark.parametrize(
    "change",
    [{"suggested_tolerance": 3}, {"config": None}, {"tables": 3}, {"tensors": [1]}],
    ids=str,
)
def test_files_that_are_no_cases_are_named(change: dict, tmp_path: Path, capsys) -> None:
    case = {"model": "nova", "kind": "set_attention", **change}
    (tmp_path / "a.json").write_text(json.dumps(case))
    assert cli.main(["verify", "--golden", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert f"golden: expected a case in {tmp_path / 'a.json'}: " in error and error.count("\n") == 1


@pytest.mark.skipif(not is_interpreted(), reason="only the interpreter computes bf16 wrongly")
def test_bf16_is_not_interpreted(capsys) -> None:
    assert run(capsys, "--dtype", "bfloat16")[0] == 1
