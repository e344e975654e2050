"""Each memory-bound kernel compiles well: it fits, spills nothing, moves 16 bytes a thread.

Under the Triton version of `rows_table.md` the numbers must also be those of the table, so that
a change of code or configuration shows in review. Other versions compile differently: there only
the limits hold.
"""

import pytest
import triton

from tests.aot import compile as aot_compile
from tests.aot import rows as aot_rows
from vidgen_kernels.latents.configs import ELEMENTWISE
from vidgen_kernels.norms.configs import ROW_WISE as NORMS
from vidgen_kernels.rope.configs import ROW_WISE as ROPE

pytestmark = pytest.mark.aot

CASES = aot_rows.cases()


@pytest.fixture(scope="module")
def table() -> dict[str, list[str]]:
    version, rows = aot_compile.read_table(aot_rows.TABLE)
    return rows if version == triton.__version__ else {}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiles_well(case: aot_rows.Case, table: dict[str, list[str]]) -> None:
    reports = aot_rows.inspect(case)
    assert reports
    for kernel, report in reports.items():
        assert report.shared <= aot_compile.SHARED_LIMIT[case.arch], kernel
        # a thread holds three sums for each of 8 columns, and has 64 registers
        is_wide = kernel == "residual_norm_bwd" and "BLOCK_D=8192" in report.constants
        if case.dtype != "float64" and not is_wide:
            assert report.local == 0, f"{kernel}: local memory where it spends its time"
        if case.dtype == "bfloat16":
            # an up-sampled row takes half as much in as out
            assert report.widest == 128, f"{kernel}: {report.loads} loads, {report.stores} stores"
    if table:
        renew = "renew the table and review it: python tests/aot/rows.py --write"
        for row in aot_rows.table_rows(case, reports):
            assert row == table.get(row[0]), renew


def test_table_holds_what_ships() -> None:
    _, rows = aot_compile.read_table(aot_rows.TABLE)
    assert {name.split(", ")[1] for name in rows} == set(map(str, CASES))


def test_every_configuration_is_compiled() -> None:
    compiled = set().union(*map(aot_rows.configurations, CASES))
    shipped = {
        (kernel, id(config)): (kernel, limit, arch, config)
        for kernel, by_length in (NORMS | ROPE).items()
        for limit, by_arch in by_length.items()
        for arch, config in by_arch.items()
    }
    shipped |= {
        (kernel, id(config)): (kernel, arch, config)
        for kernel, by_arch in ELEMENTWISE.items()
        for arch, config in by_arch.items()
    }
    assert [entry for key, entry in shipped.items() if key not in compiled] == []


SASS = """
        /*0000*/  LDG.E.128 R4, [R2.64] ;  /* 0x0000 */
        /*0010*/  LDG.E.U16.CONSTANT R8, [R2.64] ;
        /*0020*/  @P0 LDGSTS.E.BYPASS.LTC128B.128 [R9], [R2.64] ;
        /*0030*/  LDG.E R8, [R2.64] ;
        /*0040*/  STG.E.64 [R2.64], R4 ;
"""


def test_reads_the_width_of_loads() -> None:
    code = aot_compile.instructions(SASS)
    assert aot_compile.widths(code, "LDG") == {128: 2, 32: 1, 16: 1}
    assert aot_compile.widths(code, "STG") == {64: 1}
