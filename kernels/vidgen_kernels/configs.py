"""Launch configurations as data: tiles, warps and pipeline stages of every kernel.

No architecture was at hand yet: these are the ones with the best machine code, no local memory in
the main sweep (tests/aot_table.md) and, on sm_80, the sweep that keeps the tensor cores busiest
(bench/results/a100/static.md). `make gpu STAGE=tune` measures. Nothing is tuned at run time: a call
is reproducible and can be compiled ahead.
"""

from dataclasses import dataclass
from typing import TypeVar

import torch

Config = TypeVar("Config")


@dataclass(frozen=True)
class LaunchConfig:
    block_m: int  # queries per tile
    block_n: int  # keys per tile
    num_warps: int
    num_stages: int
    block_d: int = 256  # columns per block of a head's tile (`head_tiles`)

    def kwargs(self) -> dict[str, int]:
        """All but block_d, which goes with the head dim."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


C = LaunchConfig
# small tiles and blocks: short sequences and heads still have several
INTERPRETER = C(16, 16, num_warps=4, num_stages=1, block_d=64)

# {(kernel, bits of the dtype): {largest head dim: {oldest architecture: configuration}}}
# Head dims up to 96 are blocks of 64 and 32 columns; two of 64 keep more of 128 in registers.
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
    """The configuration for compute capability ``arch`` (80, 90, ...; None: the interpreter).

    Architectures in between or older use the next older one's, or sm_80's.
    """
    if arch is None:
        return INTERPRETER
    by_head_dim = INTERVAL_ATTENTION[kernel, 8 * dtype.itemsize]
    return _of_arch(by_head_dim[min(limit for limit in by_head_dim if head_dim <= limit)], arch)


def _of_arch(by_arch: dict[int, Config], arch: int) -> Config:
    return by_arch[max((a for a in by_arch if a <= arch), default=80)]


@dataclass(frozen=True)
class RowConfig:
    """Row-wise kernels: a program owns ``rows * tiles`` rows, ``rows`` of them at a time."""

    rows: int  # rows per tile, [rows, BLOCK_D]
    tiles: int  # tiles per program: what belongs to the columns is loaded, or summed, once
    num_warps: int

    def kwargs(self) -> dict[str, int]:
        return {"ROWS": self.rows, "TILES": self.tiles, "num_warps": self.num_warps}


R = RowConfig
INTERPRETER_ROWS = R(64, 2, num_warps=4)  # an interpreted program costs the same for any tile

# {kernel: {largest row, in elements: {oldest architecture: configuration}}}
ROW_WISE: dict[str, dict[int, dict[int, RowConfig]]] = {
    # rows are tokens of one head, tiles heads
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
}


def lookup_rows(kernel: str, row_length: int, arch: int | None) -> RowConfig:
    """The configuration of a row-wise kernel for rows of ``row_length`` elements; as `lookup`."""
    if arch is None:
        return INTERPRETER_ROWS
    by_length = ROW_WISE[kernel]
    return _of_arch(by_length[min(limit for limit in by_length if row_length <= limit)], arch)


@dataclass(frozen=True)
class BlockConfig:
    """Elementwise kernels: a program owns ``block`` consecutive elements."""

    block: int
    num_warps: int

    def kwargs(self) -> dict[str, int]:
        return {"BLOCK": self.block, "num_warps": self.num_warps}


INTERPRETER_BLOCK = BlockConfig(4096, num_warps=4)

# {kernel: {oldest architecture: configuration}}; 16-byte loads of bf16 take 8 elements a thread
ELEMENTWISE: dict[str, dict[int, BlockConfig]] = {
    "linear_step_fwd": {80: BlockConfig(1024, num_warps=4)},
    "linear_step_bwd": {80: BlockConfig(1024, num_warps=4)},
}


def lookup_block(kernel: str, arch: int | None) -> BlockConfig:
    """The configuration of an elementwise kernel; as `lookup`."""
    if arch is None:
        return INTERPRETER_BLOCK
    return _of_arch(ELEMENTWISE[kernel], arch)


INTERPRETER_PIXEL_BLOCK = BlockConfig(512, num_warps=4)  # four pixels each

# {bits of the dtype: {oldest architecture: configuration}} of kernels on 2 x 2 blocks of pixels; a
# program owns ``block`` blocks. A thread loads and stores 16 bytes of a row.
PIXEL_BLOCKS: dict[int, dict[int, BlockConfig]] = {
    16: {80: BlockConfig(256, num_warps=2)},
    32: {80: BlockConfig(128, num_warps=2)},
    64: {80: BlockConfig(64, num_warps=2)},
}


def lookup_pixel_blocks(dtype: torch.dtype, arch: int | None) -> BlockConfig:
    """The configuration of kernels on 2 x 2 blocks of pixels; as `lookup`."""
    if arch is None:
        return INTERPRETER_PIXEL_BLOCK
    return _of_arch(PIXEL_BLOCKS[8 * dtype.itemsize], arch)
