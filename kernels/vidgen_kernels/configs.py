"""Launch configurations as data: tiles, warps and pipeline stages of every kernel.

No architecture was at hand yet: these are the ones with the best machine code, no local memory in
the main sweep and few instructions per matrix product (tests/aot_table.md). `make gpu STAGE=tune`
measures. Nothing is tuned at run time: a call is reproducible and can be compiled ahead.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LaunchConfig:
    block_m: int  # queries per tile
    block_n: int  # keys per tile
    num_warps: int
    num_stages: int

    def kwargs(self) -> dict[str, int]:
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


C = LaunchConfig
INTERPRETER = C(
    16, 16, num_warps=4, num_stages=1
)  # small tiles: short sequences still have several

# {(kernel, bits of the dtype): {largest head dim: {oldest architecture: configuration}}}
# 96 has rows of its own: loads of tiles that are not full cost registers.
INTERVAL_ATTENTION = {
    ("fwd", 16): {
        32: {80: C(128, 64, 4, 3)},
        64: {80: C(128, 64, 4, 3), 90: C(128, 128, 8, 2)},
        96: {80: C(128, 32, 4, 3), 90: C(128, 128, 8, 2)},
        128: {80: C(128, 64, 8, 3), 90: C(128, 128, 8, 2)},
        256: {80: C(64, 64, 8, 2), 90: C(128, 64, 8, 2)},
    },
    ("dq", 16): {
        32: {80: C(128, 32, 4, 3), 90: C(128, 64, 8, 2)},
        64: {80: C(128, 32, 4, 3), 90: C(128, 128, 8, 2)},
        96: {80: C(128, 32, 8, 3), 90: C(128, 64, 8, 2)},
        128: {80: C(128, 64, 8, 3), 90: C(128, 64, 8, 2)},
        256: {80: C(64, 64, 8, 2), 90: C(128, 32, 8, 2)},
    },
    ("dkdv", 16): {
        32: {80: C(32, 128, 4, 3), 90: C(64, 128, 8, 2)},
        64: {80: C(32, 128, 4, 3), 90: C(64, 128, 8, 2)},
        96: {80: C(128, 64, 8, 2), 90: C(32, 128, 8, 2)},
        128: {80: C(128, 64, 8, 2), 90: C(64, 128, 8, 2)},
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
    """The configuration for compute capability ``arch`` (80, 90, ...; None: the interpreter).

    Architectures in between or older use the next older one's, or sm_80's.
    """
    if arch is None:
        return INTERPRETER
    by_head_dim = INTERVAL_ATTENTION[kernel, 8 * dtype.itemsize]
    by_arch = by_head_dim[min(limit for limit in by_head_dim if head_dim <= limit)]
    return by_arch[max((a for a in by_arch if a <= arch), default=80)]
