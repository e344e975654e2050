"""`CASES`: every memory-bound operator at every shape that its models have.

The benchmarks, the contract tests and the table of bytes moved run over it.
"""

from __future__ import annotations

from bench.memory.case import Draw, Floor, Inputs, MemoryCase
from bench.memory.latents import DDIM, DPM, Downsample, Euler, Renoise, TrainingPair
from bench.memory.tokens import (
    AddRMSNorm,
    LayerNorm,
    Mix,
    PostNorm,
    PostNormAdaLN,
    QKNormRope,
    ResidualNorm,
    Segment,
    TokenModulation,
)
from vidgen.shapes import MEMORY_SETS, MemoryShapes

__all__ = ["CASES", "Draw", "Floor", "Inputs", "MemoryCase", "cases"]


def cases(shapes: MemoryShapes) -> tuple[MemoryCase, ...]:
    """All variants of all operators, at the shapes of one set."""
    return (
        *(Segment(s, n=n) for s in shapes.cache for n in (1, 2, 4, 6)),
        *(Mix(s, n=n) for s in shapes.cache for n in (2, 4, 6)),
        *(ResidualNorm(s) for s in shapes.pyramid),
        *(ResidualNorm(s, affine=True) for s in shapes.cogvideox),
        *(TokenModulation(s) for s in shapes.mlp),
        *(AddRMSNorm(s) for s in shapes.cogvideox),
        *(LayerNorm(s) for s in shapes.cogvideox),
        *(PostNorm(s) for s in shapes.nova),
        *(PostNorm(s, gated=True) for s in shapes.mlp),
        *(PostNormAdaLN(s) for s in shapes.mlp),
        *(QKNormRope(s, joint=True) for s in shapes.pyramid),
        *(QKNormRope(s) for s in shapes.cogvideox),
        *(Downsample(s) for s in shapes.history),
        *(Renoise(s, drawn) for s in shapes.renoise for drawn in (False, True)),
        *(TrainingPair(s) for s in shapes.training),
        *(step(s) for s in shapes.sampler for step in (Euler, DDIM, DPM)),
    )


CASES: dict[str, tuple[MemoryCase, ...]] = {name: cases(s) for name, s in MEMORY_SETS.items()}
