"""How attention scales: frames, tokens, and units of a rollout with and without a KV cache.

A curve is attention at growing sizes, and the report fits its exponent: about 2 for a whole video,
about 1 for a new unit that attends to a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bench.attention.cases import AttentionCase
from vidgen.shapes import AttentionShape

FRAMES = "frames of fixed size"
TOKENS = "tokens in 16 frames"
UNITS = "units so far, the whole clip anew"
CACHED = "units so far, the newest with a KV cache"


@dataclass(frozen=True)
class Point:
    """One size of a curve."""

    curve: str
    x: int
    shape: AttentionShape

    @property
    def name(self) -> str:
        return self.shape.name


def make_case(point: Point, dtype: torch.dtype, device: torch.device) -> AttentionCase:
    return AttentionCase.make(point.shape, dtype, device)


def points(
    prefix: str,
    heads: int,
    head_dim: int,
    frames: tuple[int, Sequence[int]],
    tokens: Sequence[int],
    units: tuple[int, Sequence[int]],
) -> tuple[Point, ...]:
    """All curves; ``frames`` and ``units`` are tokens per block, and the numbers of blocks."""

    def shape(name: str, blocks: tuple[int, ...], new: tuple[int, int] | None = None):
        full = f"{prefix}{name}"
        return AttentionShape(full, "sweep", 1, heads, head_dim, "block_causal", blocks, new)

    size, counts = frames
    unit, steps = units
    return (
        *(Point(FRAMES, n, shape(f"frames_{n}x{size}", (size,) * n)) for n in counts),
        *(Point(TOKENS, n, shape(f"tokens_{n}", (n // 16,) * 16)) for n in tokens),
        *(Point(UNITS, n, shape(f"units_{n}", (unit,) * n)) for n in steps),
        *(Point(CACHED, n, shape(f"units_{n}_cached", (unit,) * n, (n - 1, n))) for n in steps),
    )


def _doubling(first: int, last: int) -> list[int]:
    return [first << i for i in range((last // first).bit_length())]


POINTS = {
    "real": points(
        "scaling_",
        *(16, 128),
        frames=(1024, _doubling(1, 64)),
        tokens=_doubling(1024, 131072),
        units=(1560, (1, 3, 7, 14, 21)),
    ),
    "reduced": points(
        "cpu_scaling_",
        *(4, 64),
        frames=(256, _doubling(1, 16)),
        tokens=_doubling(1024, 4096),
        units=(360, (2, 4, 8)),
    ),
    "toy": points("toy_scaling_", *(2, 16), frames=(5, (1, 2)), tokens=(32, 64), units=(4, (2, 3))),
}
