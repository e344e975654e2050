"""Launch configurations as data: (pass, dtype size, head dim, architecture) -> tiles, warps, stages."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LaunchConfig:
    block_m: int  # queries per tile
    block_n: int  # keys per tile
    num_warps: int = 4
    num_stages: int = 2

    def kwargs(self) -> dict:
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


INTERPRETER = LaunchConfig(16, 16)

# fmt: off
# 16-bit: {pass: {head dim, padded: {architecture: config}}}
HALF = {
    "fwd": {
        32: {"sm_80": LaunchConfig(128, 64, 4, 3), "sm_90": LaunchConfig(128, 64, 4, 3)},
        64: {"sm_80": LaunchConfig(128, 64, 4, 3), "sm_90": LaunchConfig(128, 128, 4, 2)},
        128: {"sm_80": LaunchConfig(128, 64, 8, 3), "sm_90": LaunchConfig(128, 128, 8, 2)},
        256: {"sm_80": LaunchConfig(128, 32, 8, 2), "sm_90": LaunchConfig(128, 64, 8, 2)},
    },
    "dq": {
        32: {"sm_80": LaunchConfig(128, 32, 4, 3), "sm_90": LaunchConfig(128, 64, 8, 2)},
        64: {"sm_80": LaunchConfig(128, 32, 4, 3), "sm_90": LaunchConfig(128, 64, 8, 2)},
        128: {"sm_80": LaunchConfig(128, 64, 8, 3), "sm_90": LaunchConfig(128, 64, 8, 2)},
        256: {"sm_80": LaunchConfig(64, 32, 8, 2), "sm_90": LaunchConfig(64, 32, 8, 2)},
    },
    "dkdv": {
        32: {"sm_80": LaunchConfig(32, 128, 4, 3), "sm_90": LaunchConfig(128, 128, 8, 2)},
        64: {"sm_80": LaunchConfig(32, 128, 4, 3), "sm_90": LaunchConfig(128, 128, 8, 2)},
        128: {"sm_80": LaunchConfig(128, 64, 8, 2), "sm_90": LaunchConfig(64, 128, 8, 2)},
        256: {"sm_80": LaunchConfig(32, 64, 8, 2), "sm_90": LaunchConfig(32, 64, 8, 2)},
    },
}
# fmt: on


def lookup(kernel: str, head_dim: int, dtype: torch.dtype, arch: str) -> LaunchConfig:
    if arch == "interpreter":
        return INTERPRETER
    for limit, row in HALF[kernel].items():
        if head_dim <= limit:
            return row["sm_90" if arch >= "sm_90" else "sm_80"]
    raise ValueError(f"head_dim: expected at most 256, got {head_dim}")
