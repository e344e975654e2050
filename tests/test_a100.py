"""What the page on the A100 says is what the machine code says; the model of the pipes is sane.

As with the tables, the page is compared under the Triton version it names.
"""

import pytest
import triton

from bench import a100
from bench.memory_cases import CASES
from tests import aot_compile, pipes
from tests.aot_compile import Instruction
from vidgen.shapes import REAL

pytestmark = pytest.mark.aot

# Percent of the tensor peak. FlashAttention-2's loops replay at 70 and 80 forward and, with atomic
# adds that are not counted, 61 and 68 backward.
REPLAY = {"fwd D 64": 74, "fwd D 128": 76, "dq D 64": 77, "dkdv D 64": 76, "dkdv D 128": 68}


@pytest.fixture(scope="module")
def rows() -> dict[str, list[str]]:
    page = a100.TABLE.read_text()
    if f"Triton\n{triton.__version__} compiles" not in page:
        pytest.skip("the page was written under another Triton version")
    return {
        name: row
        for part in page.split("## ")
        for name, row in aot_compile.table_rows(part).items()
    }


def test_the_page_names_what_ships() -> None:
    page = a100.TABLE.read_text()
    assert "# A100: not measured" in page
    shipped = {f"{c.kernel} D {c.head_dim}" for c in a100.attention_cases()}
    shipped |= {case.memory.name for case in a100.memory_cases()}
    parts = [aot_compile.table_rows(part) for part in page.split("## ")]
    kernels, calls = parts[:-1], parts[-1]
    assert {name.split(", ")[-1] for part in kernels for name in part} == shipped
    assert list(calls) == [s.name for s in (*REAL, *CASES["real"])]


@pytest.mark.parametrize("case", a100.attention_cases(), ids=str)
def test_attention(case, rows: dict[str, list[str]]) -> None:
    row = a100.attention_row(case)
    assert float(row[a100.ATTENTION.index("replay")].rstrip("%")) >= REPLAY.get(row[0], 0)
    assert rows[row[0]] == row, "renew the page and review it: python bench/a100.py --write"


@pytest.mark.parametrize("case", a100.memory_cases(), ids=str)
def test_memory(case, rows: dict[str, list[str]]) -> None:
    for row in a100.memory_rows(case):
        assert rows[row[0]] == row, "renew the page and review it: python bench/a100.py --write"


def test_projection_follows_from_the_table(rows: dict[str, list[str]]) -> None:
    attention = [rows[f"{c.kernel} D {c.head_dim}"] for c in a100.attention_cases()]
    for row in a100.projections(attention):
        assert rows[row[0]] == row


def line(opcode: str, *, stall: int = 1, sets: int = 7, waits: int = 0) -> Instruction:
    return Instruction(0, opcode, "", stall | sets << 5 | 7 << 8 | waits << 11)


HMMA = "HMMA.16816.F32.BF16"


def test_the_busiest_pipe_bounds() -> None:
    assert pipes.bound([line(HMMA)] * 4 + [line("FFMA")] * 4) == ("tensor", 32)
    assert pipes.bound([line(HMMA)] * 4 + [line("MUFU.EX2")] * 5) == ("xu", 40)
    assert pipes.bound([line(HMMA), line("LDSM.16.M88.4")]) == ("L1", 16)
    assert pipes.bound([line("BRA")] * 9) == ("control", 9)


def test_replay_waits_where_the_assembler_says() -> None:
    # 8 cycles each, whoever issues them
    assert pipes.replay([line(HMMA, stall=2)] * 8) == 64
    # one warp alone stalls 12 cycles after each, two fill the gaps of one another
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
