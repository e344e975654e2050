"""The attention shapes that the video models really produce, as data.

A shape lists the tokens of each *block*, a run of consecutive tokens with the same visibility, and
the rule that says which block sees which. Token counts follow from the models' own formulas below.

Legend: B batch (2 with classifier-free guidance), H heads, D head dim, T tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple

MaskKind = Literal["block_causal", "teacher_forcing", "full", "sets"]
Direction = Literal["fwd", "bwd", "fwd+bwd"]

# The backward has five matrix products where the forward has two.
WORK = {"fwd": 1.0, "bwd": 2.5, "fwd+bwd": 3.5}


class Segment(NamedTuple):
    """Consecutive queries that all see the same keys, the union of disjoint ranges."""

    queries: range
    keys: tuple[range, ...]


@dataclass(frozen=True)
class AttentionShape:
    """One attention call. The blocks of ``sets`` are those of sorted tokens; the call's are not."""

    name: str
    model: str
    batch: int
    heads: int
    head_dim: int
    mask: MaskKind
    blocks: tuple[int, ...]
    query_blocks: tuple[int, int] | None = None  # first, stop: only these blocks are queries
    kv_heads: int | None = None

    @property
    def n_keys(self) -> int:
        return sum(self.blocks) * (2 if self.mask == "teacher_forcing" else 1)

    @property
    def n_queries(self) -> int:
        return sum(len(s.queries) for s in self.segments)

    @property
    def segments(self) -> list[Segment]:
        """The queries in order, with what they see."""
        ends = list(accumulate(self.blocks))
        runs = [range(end - n, end) for n, end in zip(self.blocks, ends, strict=True)]
        if self.mask == "full":
            return [Segment(run, (run,)) for run in runs]
        past = [range(run.stop) for run in runs]
        if self.mask == "teacher_forcing":
            # [clean | noisy]: noisy block i sees the clean blocks before i, and itself
            noisy = [range(ends[-1] + run.start, ends[-1] + run.stop) for run in runs]
            clean = [Segment(run, (keys,)) for run, keys in zip(runs, past, strict=True)]
            before = [(range(run.start), own) for run, own in zip(runs, noisy, strict=True)]
            return clean + [Segment(own, keys) for own, keys in zip(noisy, before, strict=True)]
        first, stop = self.query_blocks or (0, len(self.blocks))
        offset = runs[first].start
        return [
            Segment(range(runs[i].start - offset, runs[i].stop - offset), (past[i],))
            for i in range(first, stop)
        ]

    @property
    def visible_pairs(self) -> int:
        """(query, key) pairs that the mask lets through, per batch row and head."""
        return sum(len(s.queries) * sum(map(len, s.keys)) for s in self.segments)

    @property
    def density(self) -> float:
        return self.visible_pairs / (self.n_queries * self.n_keys)

    @property
    def is_full(self) -> bool:
        """Every query sees every key, so that no mask is needed at all."""
        return self.visible_pairs == self.n_queries * self.n_keys

    def flops(self, direction: Direction) -> float:
        """Useful work: two products of 2 D operations per visible pair; backward 2.5 times that."""
        return WORK[direction] * 4 * self.visible_pairs * self.batch * self.heads * self.head_dim


def pyramid_blocks(base: int, unit: int, stage: int, text: int = 128) -> tuple[int, ...]:
    """Pyramid Flow at unit u, stage s: the oldest frame first, the current one last.

    The frame j units back has ``base * 4^max(s-j+1, 0)`` tokens, the current one ``base * 4^s``.
    The text is seen by all and sees the oldest frame, so the two are one block.
    """
    history = [base * 4 ** max(stage - back + 1, 0) for back in range(unit, 0, -1)]
    oldest, *rest = [*history, base * 4**stage]
    return (text + oldest, *rest)


def nova_sets(n_tokens: int, n_steps: int = 64) -> tuple[int, ...]:
    """NOVA's cosine schedule: ``round(N cos(pi/2 i/S))`` tokens are left before step i.

    Empty sets are skipped.
    """
    masked = [round(n_tokens * math.cos(math.pi / 2 * i / n_steps)) for i in range(n_steps + 1)]
    sizes = (now - after for now, after in pairwise(masked))
    return tuple(size for size in sizes if size)


def _pyramid() -> list[AttentionShape]:
    return [
        AttentionShape(
            f"pyramid_{size}_u{unit}_s{stage}_h{heads}",
            "Pyramid Flow miniFLUX" if heads == 30 else "Pyramid Flow SD3",
            *(2, heads, 64, "block_causal", pyramid_blocks(base, unit, stage)),
        )
        for size, base in (("768p", 240), ("384p", 60))
        for unit in (15, 30, 1)
        for stage in (0, 1, 2)
        for heads in (24, 30)
    ]


def _cogvideox() -> list[AttentionShape]:
    """226 text tokens, latent frames x height x width in patches; every token sees every token."""
    return [
        AttentionShape("repvideo_2b_49f", "RepVideo", 2, 30, 64, "full", (226 + 13 * 30 * 45,)),
        AttentionShape(
            "cogvideox_5b_49f", "CogVideoX 5B", 2, 48, 64, "full", (226 + 13 * 30 * 45,)
        ),
        AttentionShape(
            "cogvideox15_5b_81f", "CogVideoX 1.5 5B", 2, 48, 64, "full", (226 + 11 * 48 * 85,)
        ),
    ]


def _nova() -> list[AttentionShape]:
    """Temporal: 258 condition tokens and the first slot are one block, then 360 per frame."""
    slots = (258 + 360, *[360] * 8)
    temporal = [
        AttentionShape("nova_temporal_train", "NOVA 480x768", 3, 16, 64, "block_causal", slots)
    ]
    for step in (1, 8):
        cached = slots[: step + 1]
        last = (step, step + 1)
        temporal.append(
            AttentionShape(
                f"nova_cache_step{step}", "NOVA 480x768", 2, 16, 64, "block_causal", cached, last
            )
        )
    spatial = [
        AttentionShape(name, model, 2, 16, head_dim, "sets", (condition, *nova_sets(n_tokens)))
        for name, model, head_dim, condition, n_tokens in (
            ("nova_sets_480x768", "NOVA 480x768", 64, 360, 1440),
            ("nova_sets_1024px", "NOVA 0.6B 1024px", 64, 1024, 4096),
            ("nova_sets_1024px_d96", "NOVA 1.4B 1024px", 96, 1024, 4096),
        )
    ]
    return temporal + spatial


def _wan() -> list[AttentionShape]:
    kinds: tuple[MaskKind, ...] = ("block_causal", "teacher_forcing")
    return [
        AttentionShape(
            f"wan_{size}_{kind}", f"causal Wan {size}", 1, heads, 128, kind, (1560,) * 21
        )
        for size, heads in (("14b", 40), ("1.3b", 12))
        for kind in kinds
    ]


def _head_dims() -> list[AttentionShape]:
    return [
        AttentionShape(f"frames_16x1024_d{d}", "sweep", 1, 16, d, "block_causal", (1024,) * 16)
        for d in (64, 96, 128)
    ]


# The most telling first: a run that is cut short has measured those.
REAL: tuple[AttentionShape, ...] = (*_wan(), *_nova(), *_head_dims(), *_cogvideox(), *_pyramid())

# Real token layouts at batch 1 and 8 heads, or short sequences: minutes on two CPU cores.
REDUCED: tuple[AttentionShape, ...] = (
    AttentionShape("cpu_frames_8x512", "sweep", 1, 8, 64, "block_causal", (512,) * 8),
    AttentionShape(
        "cpu_pyramid_384p_u15_s2",
        "Pyramid Flow",
        1,
        8,
        64,
        "block_causal",
        pyramid_blocks(60, 15, 2),
    ),
    AttentionShape("cpu_nova_sets_1440", "NOVA 480x768", 1, 8, 64, "sets", nova_sets(1440)),
    AttentionShape(
        "cpu_nova_cache_step8", "NOVA 480x768", 1, 8, 64, "block_causal", (618, *[360] * 8), (8, 9)
    ),
    AttentionShape(
        "cpu_teacher_forcing_6x256", "causal Wan", 1, 4, 128, "teacher_forcing", (256,) * 6
    ),
    AttentionShape("cpu_frames_32x64_d96", "sweep", 1, 8, 96, "block_causal", (64,) * 32),
    AttentionShape("cpu_image_full", "RepVideo", 1, 8, 64, "full", (226 + 1350,)),
)

# A second each, for smoke tests.
TOY: tuple[AttentionShape, ...] = (
    AttentionShape("toy_frames", "toy", 1, 2, 16, "block_causal", (7, 5, 5, 5)),
    AttentionShape("toy_cache", "toy", 2, 2, 16, "block_causal", (7, 5, 5, 5), (2, 4)),
    AttentionShape("toy_teacher_forcing", "toy", 1, 2, 16, "teacher_forcing", (5, 3, 4)),
    AttentionShape("toy_sets", "toy", 1, 2, 16, "sets", (4, 1, 2, 3, 6)),
    AttentionShape("toy_full", "toy", 1, 2, 16, "full", (19,)),
)

SETS = {"real": REAL, "reduced": REDUCED, "toy": TOY}
