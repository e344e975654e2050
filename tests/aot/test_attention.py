"""Each shipped kernel compiles well: it fits, uses tensor cores, spills nothing in its main sweep.

Under the Triton version of `attention_table.md` the numbers must also be those of the table, so
that a change of code or configuration shows in review. Other versions compile differently: there
only the limits hold.
"""

import pytest
import triton

from tests.aot import attention as aot
from tests.aot import compile as aot_compile

pytestmark = pytest.mark.aot

HALF = ("bfloat16", "float16")
# Prototypes reached 5.5 on sm_80. Fewer rows per warp repeat loads of the other operand. At head
# dim 128 tiles of 32 keys take half an instruction more than of 64, and two thirds of the loads
# from shared memory, which bound the loop.
FORWARD_LIMIT = {64: 5.6, 96: 4.6, 128: 4.6}


@pytest.fixture(scope="module")
def table() -> dict[str, list[str]]:
    version, rows = aot_compile.read_table(aot.TABLE)
    return rows if version == triton.__version__ else {}


@pytest.mark.parametrize("case", aot.cases(), ids=str)
def test_compiles_well(case: aot.Case, table: dict[str, list[str]]) -> None:
    report = aot.inspect(case)
    assert report.shared <= aot_compile.SHARED_LIMIT[case.arch]
    # Three TF32 products, or fp64, of 256-wide rows want more registers than any tile leaves them.
    is_wide = case.head_dim > 128 and case.dtype in ("float32", "float64")
    assert report.local == 0 or is_wide, "local memory in a main sweep"
    if case.dtype == "float64":
        assert report.tensor.startswith("DMMA")
    else:
        assert report.tensor.startswith(("HMMA", "HGMMA")[: 1 + (case.arch >= 90)])
    if case.dtype in HALF and case.head_dim <= 128:  # beyond, more rows per warp would spill
        assert report.repeated == 0, "warps repeat each other's products"
    if case.kernel == "fwd" and case.dtype in HALF and case.arch == 80:
        few_rows = case.head_dim == 64 and case.launch.block_m / case.launch.num_warps < 32
        assert few_rows or report.per_mma <= FORWARD_LIMIT.get(case.head_dim, float("inf"))
    if table:
        renew = "renew the table and review it: python tests/aot/attention.py --write"
        assert aot.row(case, report) == table.get(str(case)), renew


def test_table_holds_what_ships() -> None:
    assert list(aot_compile.read_table(aot.TABLE)[1]) == [str(case) for case in aot.cases()]


SASS = """
        /*0000*/  HMMA.16816.F32 R0, R1, R2, R0 ;  /* 0x0000 */
        /*0010*/  @P0 BRA 0x0000 ;
        /*0020*/  HMMA.16816.F32 R0, R1, R2, R0 ;
        /*0030*/  @!P1 FMUL R4, R4, 2 ;
        /*0040*/  @P0 BRA 0x20 ;
        /*0050*/  @P0 BRA 0x80 ;
        /*0060*/  LDS R4, [R5] ;
        /*0070*/  @P0 BRA 0x50 ;
        /*0080*/  BRA 0x80 ;
"""


def test_finds_the_sweep_without_masks() -> None:
    assert list(map(len, aot_compile.loops(SASS))) == [2, 3, 3]
    (sweep,) = aot.main_sweeps(SASS, 1)
    assert [line.opcode for line in sweep] == ["HMMA.16816.F32", "BRA"]
    with pytest.raises(ValueError, match="no loop holds 2 products"):
        aot.main_sweeps(SASS, 2)


@pytest.mark.parametrize(
    ("opcode", "work"),
    [
        ("HMMA.16816.F32.BF16", 1),
        ("HMMA.1688.F32.TF32", 1 / 2),
        ("DMMA.884", 1 / 8),
        ("DMMA.16x8x16", 1),
        ("HGMMA.64x128x16.F32.BF16", 16),
        ("MUFU.EX2", 0),
    ],
)
def test_counts_work(opcode: str, work: float) -> None:
    assert aot.mma_work(opcode) == work
