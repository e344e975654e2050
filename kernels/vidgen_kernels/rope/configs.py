"""Rows, heads and warps of the rotation kernels, as data; see `attention/configs.py`."""

from ..common.configs import RowConfig, RowTable, lookup_rows

R = RowConfig

# {kernel: {largest head dim: {oldest architecture: configuration}}}; rows are tokens of one head,
# tiles are heads
ROW_WISE: RowTable = {
    "qk_norm_rope_fwd": {
        64: {80: R(16, 6, num_warps=4)},
        128: {80: R(8, 6, num_warps=4)},
        256: {80: R(4, 6, num_warps=4)},
    },
    "qk_norm_rope_bwd": {
        64: {80: R(16, 6, num_warps=4)},
        128: {80: R(8, 6, num_warps=4)},
        256: {80: R(4, 6, num_warps=4)},
    },
}


def lookup(kernel: str, head_dim: int, arch: int | None) -> RowConfig:
    """The configuration for heads of ``head_dim`` columns; ``arch`` None: the interpreter."""
    return lookup_rows(ROW_WISE, kernel, head_dim, arch)
