"""Head dims as blocks of columns."""

import pytest

from vidgen_kernels.attention.head_tiles import block_widths

pytestmark = pytest.mark.portable_only


@pytest.mark.parametrize("block_d", [64, 128, 256])
def test_blocks_hold_every_head_dim(block_d: int) -> None:
    for head_dim in range(1, 257):
        width, last = block_widths(head_dim, block_d).values()
        n_full = (head_dim - 1) // block_d
        assert width == block_d and last in (16, 32, 64, 128, 256) and last <= block_d
        assert n_full * width < head_dim <= n_full * width + last  # only the last needs a mask
        assert last == 16 or head_dim - n_full * width > last // 2


@pytest.mark.parametrize(("head_dim", "last"), [(16, 16), (64, 64), (80, 16), (96, 32), (128, 64)])
def test_head_dims_of_models(head_dim: int, last: int) -> None:
    assert block_widths(head_dim, 64) == {"BLOCK_D": 64, "LAST_D": last}
