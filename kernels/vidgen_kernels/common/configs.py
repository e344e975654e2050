"""How launch configurations are looked up: the newest entry of a table that a device can use.

The tables stand beside the kernels, in each family's `configs.py`. Nothing is tuned at run time: a
call is reproducible and can be compiled ahead. `make gpu STAGE=tune` measures candidates.
"""

from dataclasses import dataclass
from typing import TypeVar

Config = TypeVar("Config")


def of_size(by_size: dict[int, Config], size: int) -> Config:
    """The entry of the smallest limit that ``size`` does not exceed."""
    return by_size[min(limit for limit in by_size if size <= limit)]


def of_arch(by_arch: dict[int, Config], arch: int) -> Config:
    """The entry for compute capability ``arch`` (80, 90, ...).

    Architectures in between or older use the next older one's, or sm_80's.
    """
    return by_arch[max((a for a in by_arch if a <= arch), default=80)]


@dataclass(frozen=True)
class RowConfig:
    """Row-wise kernels: a program owns ``rows * tiles`` rows, ``rows`` of them at a time."""

    rows: int  # rows per tile, [rows, BLOCK_D]
    tiles: int  # tiles per program, which loads (or sums) vectors [D] once for all of them
    num_warps: int

    def kwargs(self) -> dict[str, int]:
        return {"ROWS": self.rows, "TILES": self.tiles, "num_warps": self.num_warps}


# an interpreted program costs the same for any tile
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
