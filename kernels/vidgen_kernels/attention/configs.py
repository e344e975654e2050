"""Tiles, warps and pipeline stages of the attention kernels, as data.

They were chosen from the compiled machine code, not from measurements on a GPU: no local memory in
the main loop (tests/aot/attention_table.md) and, on sm_80, the main loop that keeps the tensor
cores busiest (bench/results/a100/static.md). `make gpu STAGE=tune` measures candidates.
"""

from dataclasses import dataclass

import torch

from ..common.configs import of_arch, of_size


@dataclass(frozen=True)
class LaunchConfig:
    block_m: int  # queries per tile
    block_n: int  # keys per tile
    num_warps: int
    num_stages: int
    block_d: int = 256  # columns per block of a head's tile (`head_tiles`)

    def kwargs(self) -> dict[str, int]:
        """Keyword arguments of a launch, without block_d: see `head_tiles.block_widths`."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


C = LaunchConfig
# Small, so that the short sequences and small heads of tests have several tiles and blocks.
INTERPRETER = C(16, 16, num_warps=4, num_stages=1, block_d=64)

# {(kernel, bits of the dtype): {largest head dim: {oldest architecture: configuration}}}
# block_d = 64 splits a head dim of 96 into 64 + 32 columns, which avoids padding to 128. It splits
# 128 into 64 + 64, which keeps more in registers.
INTERVAL_ATTENTION = {
    ("fwd", 16): {
        32: {80: C(128, 64, 4, 3)},
        64: {80: C(128, 64, 4, 3), 90: C(128, 128, 8, 2)},
        96: {80: C(128, 64, 4, 3, 64), 90: C(128, 128, 8, 2, 64)},
        128: {80: C(256, 32, 8, 3, 64), 90: C(128, 128, 8, 2)},
        256: {80: C(64, 64, 8, 2), 90: C(128, 64, 8, 2)},
    },
    ("dq", 16): {
        32: {80: C(128, 32, 4, 3), 90: C(128, 64, 8, 2)},
        64: {80: C(128, 32, 4, 3), 90: C(128, 128, 8, 2)},
        96: {80: C(128, 32, 4, 3, 64), 90: C(128, 128, 8, 2, 64)},
        128: {80: C(128, 64, 8, 3), 90: C(128, 64, 8, 2)},
        256: {80: C(64, 64, 8, 2), 90: C(128, 32, 8, 2)},
    },
    ("dkdv", 16): {
        32: {80: C(32, 128, 4, 3), 90: C(64, 128, 8, 2)},
        64: {80: C(32, 128, 4, 3), 90: C(64, 128, 8, 2)},
        96: {80: C(32, 64, 4, 2, 64), 90: C(64, 128, 8, 2, 64)},
        128: {80: C(32, 128, 8, 2), 90: C(64, 128, 8, 2)},
        256: {80: C(64, 64, 8, 2), 90: C(32, 32, 4, 2)},
    },
    ("fwd", 32): {
        64: {80: C(128, 32, 8, 2)},
        128: {80: C(32, 32, 4, 2)},
        256: {80: C(16, 32, 8, 1)},
    },
    ("dq", 32): {64: {80: C(32, 64, 8, 2)}, 128: {80: C(32, 32, 8, 2)}, 256: {80: C(16, 16, 8, 1)}},
    ("dkdv", 32): {
        64: {80: C(64, 32, 8, 2)},
        128: {80: C(32, 16, 4, 1)},
        256: {80: C(16, 16, 8, 1)},
    },
    ("fwd", 64): {
        64: {80: C(32, 32, 4, 2)},
        128: {80: C(16, 32, 4, 2)},
        256: {80: C(16, 16, 8, 1)},
    },
    ("dq", 64): {64: {80: C(32, 32, 4, 2)}, 128: {80: C(16, 32, 4, 2)}, 256: {80: C(16, 16, 8, 1)}},
    ("dkdv", 64): {
        64: {80: C(32, 32, 4, 2)},
        128: {80: C(16, 16, 4, 1)},
        256: {80: C(16, 16, 8, 1)},
    },
}


def lookup(kernel: str, head_dim: int, dtype: torch.dtype, arch: int | None) -> LaunchConfig:
    """The configuration for compute capability ``arch`` (80, 90, ...); None: the interpreter."""
    if arch is None:
        return INTERPRETER
    return of_arch(of_size(INTERVAL_ATTENTION[kernel, 8 * dtype.itemsize], head_dim), arch)
