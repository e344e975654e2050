"""Looks up launch configurations: the newest entry of a table that a device can use.

The tables are in the `configs.py` of each family. Nothing is tuned at run time, so calls are
reproducible and kernels can be compiled ahead of time. `make gpu STAGE=tune` measures candidates.
"""

from dataclasses import dataclass
from typing import TypeVar

Config = TypeVar("Config")


def of_size(by_size: dict[int, Config], size: int) -> Config:
    """The entry with the smallest limit of at least ``size``."""
    return by_size[min(limit for limit in by_size if size <= limit)]


def of_arch(by_arch: dict[int, Config], arch: int) -> Config:
    """The entry for compute capability ``arch`` (80, 90, ...).

    An architecture without an entry uses that of the next older one; if there is none, sm_80's.
    """
    return by_arch[max((a for a in by_arch if a <= arch), default=80)]


@dataclass(frozen=True)
class RowConfig:
    """Row-wise kernels: a program owns ``rows * tiles`` rows, ``rows`` of them at a time."""

    rows: int  # rows per tile, [rows, BLOCK_D]
    tiles: int  # tiles per program; per-column vectors are loaded, or summed, once for all
    num_warps: int

    def kwargs(self) -> dict[str, int]:
        return {"ROWS": self.rows, "TILES": self.tiles, "num_warps": self.num_warps}


# Large: an interpreted program takes about as long for a small tile.
INTERPRETER_ROWS = RowConfig(64, 2, num_warps=4)

# {kernel: {largest row, in elements: {oldest architecture: configuration}}}
RowTable = dict[str, dict[int, dict[int, RowConfig]]]


def lookup_rows(table: RowTable, kernel: str, row_length: int, arch: int | None) -> RowConfig:
    """The configuration for rows of ``row_length`` elements; ``arch`` None: the interpreter."""
    return INTERPRETER_ROWS if arch is None else of_arch(of_size(table[kernel], row_length), arch)


@dataclass(frozen=True)
class BlockConfig:
    """Elementwise kernels: a program owns ``block`` consecutive elements."""

    block: int
    num_warps: int

    def kwargs(self) -> dict[str, int]:
        return {"BLOCK": self.block, "num_warps": self.num_warps}
