"""The page on the A100 says what the machine code says; the model of the pipes is sane.

The page is compared only under the Triton version that it names.
"""

import json
from pathlib import Path

import pytest
import torch
import triton
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.a100 import models, static
from bench.memory.registry import CASES, MemoryCase
from bench.models.registry import STEPS
from tests.aot import pipes
from tests.aot.compile import Instruction, table_rows
from vidgen.ops import FUSED
from vidgen.shapes import REAL

RENEW = "renew the page and review it: python bench/a100/static.py --write"
pytestmark = pytest.mark.aot

# The least replay, in percent of the tensor peak. FlashAttention-2's loops replay at 70 and 80
# forward and, with atomic adds that are not counted, at 61 and 68 backward.
REPLAY = {"fwd D 64": 74, "fwd D 128": 76, "dq D 64": 77, "dkdv D 64": 76, "dkdv D 128": 68}
# The operators that a step of a model calls.
OPS = ("residual_norm", "post_norm", "qk_norm_rope", "qk_norm_rope_joint")
COUNTED = [case for case in CASES["reduced"] if case.variant in OPS]


@pytest.fixture(scope="module")
def rows() -> dict[str, list[str]]:
    page = static.TABLE.read_text()
    if f"Triton\n{triton.__version__} compiles" not in page:
        pytest.skip("the page was written under another Triton version")
    return {name: row for part in page.split("## ") for name, row in table_rows(part).items()}


def replays(rows: dict[str, list[str]]) -> dict[str, float]:
    return static.replays([rows[f"{c.kernel} D {c.head_dim}"] for c in static.attention_cases()])


def test_the_page_names_what_ships() -> None:
    page = static.TABLE.read_text()
    assert "# A100: not measured" in page
    shipped = {f"{c.kernel} D {c.head_dim}" for c in static.attention_cases()}
    shipped |= {case.memory.name for case in static.memory_cases()}
    own, *_ = page.split(static.ON_MEASURED)
    *kernels, calls, steps = (table_rows(part) for part in own.split("## "))
    assert {name.split(", ")[-1] for part in kernels for name in part} == shipped
    assert list(calls) == [s.name for s in (*REAL, *CASES["real"])]
    assert list(steps) == [s.spec.name for s in models.STEPS]
    assert {s.spec.name for s in models.STEPS} <= {s.name for s in STEPS["real"]}


@pytest.mark.parametrize("case", static.attention_cases(), ids=str)
def test_attention(case, rows: dict[str, list[str]]) -> None:
    row = static.attention_row(case)
    assert float(row[static.ATTENTION_HEADERS.index("replay")].rstrip("%")) >= REPLAY.get(row[0], 0)
    assert rows[row[0]] == row, RENEW


@pytest.mark.parametrize("case", static.memory_cases(), ids=str)
def test_memory(case, rows: dict[str, list[str]]) -> None:
    for row in static.memory_rows(case):
        assert rows[row[0]] == row, RENEW


def test_projection_follows_from_the_table(rows: dict[str, list[str]]) -> None:
    for row in static.projections(replays(rows)):
        assert rows[row[0]] == row


@pytest.mark.parametrize("step", models.STEPS, ids=lambda s: s.spec.name)
def test_step(step: models.Step, rows: dict[str, list[str]]) -> None:
    row = static.step_row(step, replays(rows))
    assert rows[row[0]] == row, RENEW


def test_what_was_measured_elsewhere_is_on_the_page(rows: dict[str, list[str]]) -> None:
    for row in static.measured_rows(static.RESULTS):
        assert rows[row[0]] == row, RENEW


def test_a_measured_share_is_one_of_the_peak_of_an_a100(tmp_path: Path) -> None:
    """200 TFLOP/s for 2 ms are 400 GFLOP, at half of the peak; here at half of 312 TFLOP/s."""
    info = {"op": "attention", "shape": "frames", "dtype": "bf16", "direction": "fwd"}
    info |= {"tflops": 200.0, "fraction_of_peak": 0.5, "median_ms": 2.0, "gpu": "NVIDIA H200"}
    found = [{**info, "provider": p} for p in ("ours", "flex")] + [{**info, "dtype": "fp16"}]
    found[-1]["provider"] = "ours"
    stats = {"median": 2e-3, "iqr": 0.0}
    results = {"benchmarks": [{"stats": stats, "extra_info": x} for x in found]}
    for folder in ("nvidia-h200", "cpu"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "attention.json").write_text(json.dumps(results))
    (row,) = static.measured_rows(tmp_path)
    low, high = (400 / (0.5 * 312 * share) for share in reversed(models.CUBLAS))
    assert row == ["frames, NVIDIA H200", "50%", "-", f"{low:.3g} to {high:.3g}", "-"]


def counted(function, *args) -> list[models.Call]:
    """The operators of a call on fake tensors."""
    mode = models.Counted(lambda q, k: q.shape[2] * k.shape[2])
    with torch.no_grad(), mode:
        function(*args)
    return mode.calls


def test_products_are_counted_with_what_they_read_and_write() -> None:
    with FakeTensorMode():
        layer, x = nn.Linear(32, 48), torch.empty(2, 5, 32)
        (call,) = counted(layer, x)
    weights = 48 * 32 + 48
    assert call == models.Call("linear", 2 * 10 * 32 * 48, 4 * (10 * 32 + weights + 10 * 48))


def test_only_what_moves_is_counted() -> None:
    with FakeTensorMode():
        x = torch.empty(4, 6)
        assert counted(lambda: torch.empty_like(x.mT.unflatten(0, (2, 3))[1:])) == []
        assert counted(lambda: x.mT.contiguous()) == [models.Call("other", 0, 2 * 4 * 24)]
        assert counted(lambda: x.add_(1)) == [models.Call("other", 0, 4 * 24)]


@pytest.mark.parametrize("case", COUNTED, ids=lambda case: case.name)
def test_our_operators_move_their_floor(case: MemoryCase) -> None:
    with FakeTensorMode(), torch.no_grad():
        inputs = case.inputs(torch.bfloat16, "cpu")
        (call,) = [c for c in counted(case.call, FUSED, inputs) if c.part == "ours"]
    assert call.n_bytes == pytest.approx(case.floor(torch.bfloat16).fwd, rel=0.01)


def test_a_step_takes_as_long_as_the_slower_of_its_two_bounds() -> None:
    linear, moved = (0.5 * peak * 1e-3 for peak in (pipes.TENSOR_PEAK, pipes.DRAM))
    calls = [
        models.Call("linear", linear, 0),
        models.Call("linear", 0, moved),
        models.Call("attention", 1e11, 0, head_dim=64),
        models.Call("ours", 0, moved),
        models.Call("other", 0, 2 * moved),
    ]
    row = models.projected(calls, lambda head_dim: (100.0, 200.0), (0.5, 1.0))
    numbers = dict(zip(models.HEADERS[1:], row, strict=True))
    slow, fast = (0.5 / share for share in models.CUBLAS)
    assert numbers["linear, ms"] == f"{fast + 0.5:.3g} to {slow + 1:.3g}"
    assert numbers["attention, ms"] == "0.5 to 1"
    assert numbers["ours, ms"] == "0.5 to 1" and numbers["other, ms"] == "1 to 2"
    assert numbers["step, ms"] == f"{fast + 2.5:.3g} to {slow + 5:.3g}"


def line(opcode: str, *, stall: int = 1, sets: int = 7, waits: int = 0) -> Instruction:
    return Instruction(0, opcode, "", stall | sets << 5 | 7 << 8 | waits << 11)


HMMA = "HMMA.16816.F32.BF16"


def test_the_busiest_pipe_bounds() -> None:
    assert pipes.bound([line(HMMA)] * 4 + [line("FFMA")] * 4) == ("tensor", 32)
    assert pipes.bound([line(HMMA)] * 4 + [line("MUFU.EX2")] * 5) == ("xu", 40)
    assert pipes.bound([line(HMMA), line("LDSM.16.M88.4")]) == ("L1", 16)
    assert pipes.bound([line("BRA")] * 9) == ("control", 9)


def test_replay_waits_where_the_assembler_says() -> None:
    # 8 cycles each, for any number of warps
    assert pipes.replay([line(HMMA, stall=2)] * 8) == 64
    # one warp alone stalls for 12 cycles after each; two fill each other's gaps
    slow = [line(HMMA, stall=12)] * 8
    assert pipes.replay(slow, n_warps=1) == 96
    assert pipes.replay(slow, n_warps=2) == 64
    # a product that waits for what was loaded
    load = [line("LDSM.16.M88.4", sets=0), line(HMMA, waits=1)]
    assert pipes.replay(load, n_warps=1) == pytest.approx(pipes.LATENCY["LDSM"] + 1)


def test_occupancy_counts_what_runs_out_first() -> None:
    assert pipes.occupancy(255, 49152, 4) == 8  # registers
    assert pipes.occupancy(32, 81920, 4) == 8  # shared memory
    assert pipes.occupancy(16, 0, 1) == 32  # blocks
    assert pipes.occupancy(32, 0, 8) == 64  # warps
