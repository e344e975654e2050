"""Launch configurations of the kernels on rows of tokens, chosen as in `attention/configs.py`."""

from ..common.configs import RowConfig, RowTable, lookup_rows

R = RowConfig

# {kernel: {largest row, in elements: {oldest architecture: configuration}}}
ROW_WISE: RowTable = {
    "residual_norm_fwd": {
        1024: {80: R(1, 16, num_warps=4)},
        2048: {80: R(1, 16, num_warps=8)},
        4096: {80: R(1, 16, num_warps=8)},
        8192: {80: R(1, 16, num_warps=16)},
    },
    "residual_norm_bwd": {
        1024: {80: R(1, 32, num_warps=4)},
        2048: {80: R(1, 32, num_warps=8)},
        4096: {80: R(1, 32, num_warps=16)},
        8192: {80: R(1, 32, num_warps=32)},
    },
    "post_norm_fwd": {
        1024: {80: R(1, 16, num_warps=4)},
        2048: {80: R(1, 16, num_warps=8)},
        4096: {80: R(1, 16, num_warps=16)},
        8192: {80: R(1, 16, num_warps=16)},
    },
    "post_norm_bwd": {
        1024: {80: R(1, 32, num_warps=4)},
        2048: {80: R(1, 32, num_warps=4)},
        4096: {80: R(1, 32, num_warps=16)},
        8192: {80: R(1, 32, num_warps=32)},
    },
    "post_norm_adaln_fwd": {
        1024: {80: R(1, 16, num_warps=4)},
        2048: {80: R(1, 16, num_warps=8)},
        4096: {80: R(1, 16, num_warps=16)},
    },
    "post_norm_adaln_bwd": {
        1024: {80: R(1, 32, num_warps=4)},
        2048: {80: R(1, 32, num_warps=8)},
        4096: {80: R(1, 32, num_warps=16)},
    },
}


def lookup(kernel: str, row_length: int, arch: int | None) -> RowConfig:
    """The configuration for rows of ``row_length`` elements; ``arch`` None: the interpreter."""
    return lookup_rows(ROW_WISE, kernel, row_length, arch)
