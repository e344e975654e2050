"""The memory-bound operators move little more than they must: the committed table, cell by cell.

Kernels are counted where they are interpreted, PyTorch's operators and Inductor in the other pass.
"""

import pytest
import torch

from bench.memory.registry import MemoryCase
from tests.kernels import traffic
from vidgen_kernels.common.launch import is_interpreted

ALLOWED = 1.1  # of the floor
RENEW = "renew the table and review it: python tests/kernels/traffic.py --write"

every_case = pytest.mark.parametrize("case", traffic.REAL, ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def _as_users_run() -> None:
    torch.use_deterministic_algorithms(False)  # Inductor chooses other kernels under it


# One of each operator: to count in the interpreter takes seconds. The tool counts them all.
OF_EACH_OP = list({case.op: case for case in traffic.REAL}.values())


@pytest.mark.parametrize("case", OF_EACH_OP, ids=lambda case: case.name)
@pytest.mark.skipif(not is_interpreted(), reason="counts interpreted kernels")
def test_kernels(case: MemoryCase) -> None:
    moved, least = traffic.kernels(case), traffic.floor(case)
    assert moved.fwd <= ALLOWED * least.fwd and moved.bwd <= ALLOWED * least.bwd
    check_cells(case, "ours")


@every_case
@pytest.mark.portable_only
@pytest.mark.parametrize("column", ["floor", "eager", "compile"])
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # Dynamo looks at inputs
def test_baselines(case: MemoryCase, column: str) -> None:
    if column == "compile" and traffic.read_table()[0] != torch.__version__.split("+")[0]:
        pytest.skip("another version of PyTorch fuses otherwise")
    check_cells(case, column)


def check_cells(case: MemoryCase, column: str) -> None:
    row = traffic.read_table()[1].get(case.name, {})
    cells = traffic.cells(case, column)
    assert {name: row.get(name) for name in cells} == cells, RENEW


@pytest.mark.portable_only
@every_case
def test_the_table_keeps_to_the_limit(case: MemoryCase) -> None:
    row = traffic.read_table()[1][case.name]
    for direction in traffic.Moved._fields:
        ratio = float(row[f"ours, {direction}"].split("(")[1].strip(")"))
        assert ratio <= ALLOWED


@pytest.mark.portable_only
def test_table_holds_every_case() -> None:
    assert list(traffic.read_table()[1]) == [case.name for case in traffic.REAL]


@pytest.mark.portable_only
def test_counts_what_operators_read_and_write() -> None:
    x, row = torch.ones(8, 4), torch.ones(4)
    with (tally := traffic.Tally()):
        (x.view(4, 8) * 2).mT  # noqa: B018
        torch.add(x, row.expand(8, 4), out=torch.empty(8, 4))
        x.sum()
    assert tally.bytes == 4 * ((32 + 32) + (32 + 4 + 32) + (32 + 1))
