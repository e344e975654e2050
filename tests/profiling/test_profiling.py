"""Named ranges only where they are asked for; the command lines of the profilers."""

import gzip
import importlib.util
import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.profiler import profile
from torch.utils._python_dispatch import _get_current_dispatch_mode

from bench.suites import SUITES
from tests.paths import ROOT
from vidgen_kernels import block_causal_attention

pytestmark = pytest.mark.portable_only

PROFILING = ROOT / "profiling"
OPS = {"interval_attention_fwd", "interval_attention_bwd"}


def load(name: str):
    """Loads by path, as `profiling` is a package of the standard library from Python 3.15 on."""
    path = PROFILING / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"vidgen_profiling_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ranges = load("ranges")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, H, T, 8]
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return x + block_causal_attention(q, k, v, [3, 2])


def step(model: nn.Module) -> None:
    model(torch.randn(1, 2, 5, 8)).sum().backward()


def names(profiler: profile) -> set[str]:
    return {event.name for event in profiler.events()}


def test_ranges_have_the_names_of_ops_and_modules() -> None:
    model = nn.Sequential(Block(), Block())
    with profile() as profiler, ranges.enabled(model):
        step(model)
    modules = {"Sequential", "0", "1", "0.qkv", "1.qkv"}
    assert OPS | modules | {f"{name} backward" for name in modules} <= names(profiler)


def test_nothing_is_left_behind() -> None:
    model = nn.Sequential(Block(), nn.Linear(7, 8))
    with ranges.enabled(model), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        step(model)
    assert _get_current_dispatch_mode() is None
    for module in model.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks
        assert not module._backward_pre_hooks and not module._backward_hooks
    with profile() as profiler:
        step(model[0])
    assert not names(profiler) & (OPS | {"Sequential", "0", "0.qkv"})


def test_outer_ranges_survive_an_error() -> None:
    with profile() as profiler, ranges.region("outer"):
        with pytest.raises(ZeroDivisionError), ranges.region("inner"):
            raise ZeroDivisionError
        torch.ones(1)
    events = {event.name: event.time_range for event in profiler.events()}
    assert events["outer"].end >= events["aten::ones"].end >= events["inner"].end


def test_compiles_to_one_graph_with_and_without_ranges() -> None:
    x = torch.randn(1, 2, 5, 8)
    for compiled_under in (nullcontext, ranges.enabled):
        torch.compiler.reset()
        model = Block()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with compiled_under():
            torch.testing.assert_close(compiled(x), model(x))
        with profile() as profiler, ranges.enabled():
            compiled(x)
        assert "interval_attention_fwd" in names(profiler)


def run(*args: str, **environment: str) -> str:
    return subprocess.run(
        args, env={**os.environ, **environment}, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize(
    ("suite", "shape", "op"),
    [("attention", "toy_cache", "interval_attention"), ("memory", "mix_n4-toy", "residual_norm")],
)
def test_run_writes_a_table_and_a_trace(tmp_path: Path, suite: str, shape: str, op: str) -> None:
    arguments = [f"--op={suite}", f"--shape={shape}", "--dtype=fp32", f"--output={tmp_path}"]
    table = run(sys.executable, str(PROFILING / "run.py"), *arguments)
    stem = f"{suite}-{shape}-ours-fp32-fwd_bwd"
    assert (tmp_path / f"{stem}.txt").read_text() in table
    with gzip.open(tmp_path / f"{stem}.json.gz") as file:
        events = json.load(file)["traceEvents"]
    names = {e["name"] for e in events if e.get("cat") == "user_annotation"}
    assert names >= {f"{op}_fwd", f"{op}_bwd"}


def test_bad_arguments_end_before_the_work(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.syspath_prepend(PROFILING)  # as for a script that is run by path
    (tmp_path / "file").write_text("")
    for arguments, message in (
        (["--calls", "0"], "--calls: expected a whole number from 1 to 1000, got 0"),
        (["--output", str(tmp_path / "file")], "--output: expected a folder that can be written"),
    ):
        with pytest.raises(SystemExit):
            load("run").parse(arguments)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("tool", ["nsys", "ncu"])
def test_scripts_say_what_they_run(tool: str) -> None:
    script = str(PROFILING / f"{tool}.sh")
    run("bash", "-n", script)
    line = run(script, "--dry-run", "/tmp/a report", "--shape=toy_cache", RANGE="one")
    region = "run.py --mode=region --shape=toy_cache"
    expected = {
        "nsys": ["--capture-range=cudaProfilerApi", "cuda\\,nvtx", "--output=/tmp/a\\ report"],
        "ncu": [
            *("--profile-from-start off", "--clock-control none", "--import-source yes"),
            *("--nvtx-include vidgen@one/", "--export /tmp/a\\ report"),
        ],
    }
    assert line.startswith(f"{tool} ")
    assert all(words in line for words in (*expected[tool], region)), line


def test_output_is_pasted_below_its_command() -> None:
    paste = load("paste")
    text = 'Say it:\n\n    $ python -c "print(6 * 7)"\n    41\n    40\n\nand go on.\n'
    pasted = paste.pasted(text)
    assert pasted == 'Say it:\n\n    $ python -c "print(6 * 7)"\n    42\n\nand go on.\n'
    assert paste.pasted(pasted) == pasted
    with pytest.raises(subprocess.CalledProcessError):
        paste.pasted("    $ python -c 'raise SystemExit(1)'\n")


def test_the_page_shows_what_its_commands_printed() -> None:
    page = (PROFILING / "README.md").read_text()
    blocks = list(load("paste").BLOCK.finditer(page))
    assert len(blocks) >= 4
    assert all(len(block[0].splitlines()) > 1 for block in blocks)  # the command, then its output


def test_documents_name_shapes_that_exist() -> None:
    known = {name for suite in SUITES.values() for name in suite.names}
    documents = [p for p in PROFILING.parent.glob("*/*.md") if "results" not in p.parts]
    named = {m for p in documents for m in re.findall(r"--shape (\w[\w.-]*)", p.read_text())}
    assert named and named <= known


class Library:
    """Stands for the nvtx package, or for `torch.cuda.nvtx`; keeps a list of calls."""

    def __init__(self) -> None:
        self.calls = []

    def get_domain(self, name: str) -> "Library":
        self.calls.append(name)
        return self

    def get_event_attributes(self, message: str) -> str:
        return message

    def __getattr__(self, name: str):
        return lambda *arguments: self.calls.append((name, *arguments))


@pytest.mark.parametrize("has_package", [True, False])
def test_ranges_are_in_a_domain_where_there_is_nvtx(has_package: bool, monkeypatch) -> None:
    library = Library()
    monkeypatch.setitem(sys.modules, "nvtx", library if has_package else None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "nvtx", library)
    with load("ranges").region("one"):  # a new module, as the library is looked up once
        pass
    push, pop = ("push_range", "pop_range") if has_package else ("range_push", "range_pop")
    assert library.calls == ["vidgen"] * has_package + [(push, "one"), (pop,)]
