"""The shapes that occur in the video models, as data for benchmarks and tests.

An attention shape has the number of tokens in each *block* (consecutive tokens that attend to the
same keys), and the rule which block attends to which. The numbers follow from the models' formulas
below. Shapes of memory-bound operators, which work on rows of tokens or on latents, are at the end;
`bench.memory.registry` says which operator is measured at which of them.

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
    """Consecutive queries that attend to the same keys, a union of disjoint ranges."""

    queries: range
    keys: tuple[range, ...]


@dataclass(frozen=True)
class AttentionShape:
    """One attention call. For ``sets``, the blocks are those after sorting the tokens."""

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
        """The queries in order, with the keys that they attend to."""
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
        """Whether every query attends to every key, so that no mask is needed."""
        return self.visible_pairs == self.n_queries * self.n_keys

    def flops(self, direction: Direction) -> float:
        """Operations: two products of 2 D each per visible pair, in the backward 2.5 times that."""
        return WORK[direction] * 4 * self.visible_pairs * self.batch * self.heads * self.head_dim


def pyramid_blocks(base: int, unit: int, stage: int, text: int = 128) -> tuple[int, ...]:
    """Blocks of Pyramid Flow at unit u, stage s, from the oldest frame to the current one.

    The frame j units back has ``base * 4^max(s-j+1, 0)`` tokens, the current one ``base * 4^s``.
    All tokens attend to the text, and the text attends to the oldest frame: they are one block.
    """
    history = [base * 4 ** max(stage - back + 1, 0) for back in range(unit, 0, -1)]
    oldest, *rest = [*history, base * 4**stage]
    return (text + oldest, *rest)


def nova_sets(n_tokens: int, n_steps: int = 64) -> tuple[int, ...]:
    """Sizes of NOVA's sets: before step i, ``round(N cos(pi/2 i/S))`` tokens are left.

    Empty sets are omitted.
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
    """226 text tokens and the patches of the video, frames x rows x columns; full attention."""
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
    """Temporal: one block of 258 condition tokens and the first slot, then 360 per frame."""
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


# The most important first, so that a run that is cut short has measured them.
REAL: tuple[AttentionShape, ...] = (*_wan(), *_nova(), *_head_dims(), *_cogvideox(), *_pyramid())

# Layouts of the models at batch 1 with 8 heads, or short sequences: minutes on two CPU cores.
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


# ---- memory-bound operators


@dataclass(frozen=True)
class TokenShape:
    """Rows ``[batch, text + video, hidden]`` between the matrix products of a transformer."""

    name: str
    model: str
    batch: int
    text: int  # rows at the front, with a modulation and projections of their own
    video: int
    hidden: int
    head_dim: int = 64
    axes: tuple[int, ...] = ()  # channels of a head that each rotary axis turns

    @property
    def tokens(self) -> int:
        return self.text + self.video

    @property
    def numel(self) -> int:
        return self.batch * self.tokens * self.hidden


@dataclass(frozen=True)
class LatentShape:
    """A latent ``[batch, channels, frames, height, width]``, at its highest resolution."""

    name: str
    model: str
    batch: int
    channels: int
    frames: int
    height: int
    width: int

    @property
    def size(self) -> tuple[int, int, int, int, int]:
        return self.batch, self.channels, self.frames, self.height, self.width

    @property
    def numel(self) -> int:
        return math.prod(self.size)


@dataclass(frozen=True)
class MemoryShapes:
    """The shapes of one set, by what they are used for."""

    pyramid: tuple[TokenShape, ...]  # text and video are streams of their own
    cache: tuple[TokenShape, ...]  # models with a feature cache; text and video in one sequence
    cogvideox: tuple[TokenShape, ...]  # rotary or not, text and video in one sequence
    nova: tuple[TokenShape, ...]  # norm after the layer
    mlp: tuple[TokenShape, ...]  # a modulation per token
    history: tuple[LatentShape, ...]  # down to the next stage
    renoise: tuple[LatentShape, ...]  # up into this stage
    training: tuple[LatentShape, ...]
    sampler: tuple[LatentShape, ...]


_AXES = (16, 24, 24)  # time, row, column


def _pyramid_tokens(name: str, base: int, hidden: int, axes: tuple[int, ...]) -> TokenShape:
    video = sum(pyramid_blocks(base, unit=15, stage=2, text=0))
    return TokenShape(name, "Pyramid Flow", 2, 128, video, hidden, axes=axes)


_REPVIDEO = TokenShape("repvideo_2b", "RepVideo", 2, 226, 13 * 30 * 45, 1920)
_COGVIDEOX = TokenShape("cogvideox_5b", "CogVideoX 5B", 2, 226, 13 * 30 * 45, 3072, axes=_AXES)

REAL_MEMORY = MemoryShapes(
    pyramid=(
        _pyramid_tokens("flux_768p_u15_s2", 240, 1920, _AXES),
        _pyramid_tokens("sd3_768p_u15_s2", 240, 1536, (64,)),
        _pyramid_tokens("flux_384p_u15_s2", 60, 1920, _AXES),
    ),
    cache=(_REPVIDEO, _COGVIDEOX),
    cogvideox=(_REPVIDEO, _COGVIDEOX),
    nova=(
        TokenShape("nova_0.6b_1024px", "NOVA 0.6B", 2, 0, 1024 + 4096, 1024),
        TokenShape("nova_1.4b_1024px", "NOVA 1.4B", 2, 0, 1024 + 4096, 1536, head_dim=96),
    ),
    mlp=(
        TokenShape("nova_mlp_train", "NOVA 480x768, training", 108, 0, 1440, 1280),
        TokenShape("nova_mlp_set", "NOVA 480x768, largest set", 2, 0, 36, 1280),
    ),
    history=(LatentShape("pyramid_768p_10s", "Pyramid Flow", 1, 16, 31, 96, 160),),
    renoise=(
        LatentShape("pyramid_768p", "Pyramid Flow", 2, 16, 1, 96, 160),
        LatentShape("pyramid_768p_b64", "Pyramid Flow, 64 videos", 64, 16, 1, 96, 160),
    ),
    training=(LatentShape("pyramid_384p_train", "Pyramid Flow", 4, 16, 16, 48, 80),),
    sampler=(
        LatentShape("repvideo_2b_latent", "RepVideo", 1, 16, 13, 60, 90),
        LatentShape("cogvideox15_81f_b8", "CogVideoX 1.5, 8 videos", 8, 16, 22, 96, 170),
    ),
)

_IMAGE = 30 * 45  # video tokens of one latent frame of CogVideoX

REDUCED_MEMORY = MemoryShapes(
    pyramid=(TokenShape("cpu_flux", "Pyramid Flow", 1, 128, 960, 1920, axes=_AXES),),
    cache=(TokenShape("cpu_repvideo", "RepVideo", 1, 226, _IMAGE, 1920),),
    cogvideox=(TokenShape("cpu_cogvideox", "CogVideoX 5B", 1, 226, _IMAGE, 3072, axes=_AXES),),
    nova=(TokenShape("cpu_nova", "NOVA 480x768", 1, 0, 360 + 1440, 1024),),
    mlp=(TokenShape("cpu_nova_mlp", "NOVA 480x768, training", 1, 0, 1440, 1280),),
    history=(LatentShape("cpu_history", "Pyramid Flow", 1, 16, 8, 96, 160),),
    renoise=(LatentShape("cpu_renoise", "Pyramid Flow", 2, 16, 1, 48, 80),),
    training=(LatentShape("cpu_train", "Pyramid Flow", 1, 16, 16, 48, 80),),
    sampler=(LatentShape("cpu_latent", "RepVideo", 1, 16, 13, 60, 90),),
)

_TOY_TOKENS = TokenShape("toy", "toy", 2, 3, 10, 48, head_dim=24, axes=(8, 8, 8))
_TOY_VIDEO = TokenShape("toy", "toy", 2, 0, 5, 40)
_TOY_LATENT = LatentShape("toy", "toy", 2, 3, 2, 6, 10)

TOY_MEMORY = MemoryShapes(
    pyramid=(_TOY_TOKENS,),
    cache=(_TOY_TOKENS,),
    cogvideox=(_TOY_TOKENS,),
    nova=(_TOY_VIDEO,),
    mlp=(_TOY_VIDEO,),
    history=(_TOY_LATENT,),
    renoise=(_TOY_LATENT,),
    training=(_TOY_LATENT,),
    sampler=(_TOY_LATENT,),
)

MEMORY_SETS = {"real": REAL_MEMORY, "reduced": REDUCED_MEMORY, "toy": TOY_MEMORY}
