"""The blocks of Pyramid Flow's transformers: modulated norms, attention, feed-forward.

Every part f of a block adds to the residual stream as in DiT (arXiv 2212.09748, adaLN-Zero):

    x <- x + gate * f((1 + scale) * LN(x) + shift)

shift, scale and gate come from timestep and pooled text (`Condition`): one vector ``[B, D]`` per
column, not one per token. The addition is put off until the next norm (`Stream`), so that one
operator adds, normalises and modulates.

Shapes: B batch rows, N columns, S text tokens, L video tokens of a column, T all tokens of the
packed sequence, D width. Module names are those of the checkpoints.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidgen.common.layers import FeedForward
from vidgen.ops import Ops

from .attention import Attention, JointAttention
from .kv_cache import BlockCache
from .sequence import Packing, join, split

NORM_EPS = 1e-6
FP16_MAX = torch.finfo(torch.float16).max

Vectors = list[Tensor]  # a vector [rows, D] for each part of a stream


class Modulation(NamedTuple):
    """The shift and scale of a norm, and the gate of the layer that reads it."""

    shift: Vectors
    scale: Vectors
    gate: Vectors | None = None


class Condition(NamedTuple):
    """SiLU of the embedded timestep and pooled text; every layer projects its modulation from it.

    Projections are stored in ``kept`` if there is one, so that a caller who uses the condition
    again saves computing them.
    """

    c: Tensor  # [B * N, D]
    kept: dict[nn.Module, Tensor] | None = None

    def project(self, linear: nn.Module) -> Tensor:
        if self.kept is None:
            return linear(self.c)
        if linear not in self.kept:
            self.kept[linear] = linear(self.c)
        return self.kept[linear]


class AdaLNZero(nn.Module):
    """The modulation of ``n_norms`` norms, each in the order shift, scale, gate."""

    order: tuple[str, ...] = ("shift", "scale", "gate")

    def __init__(self, width: int, n_norms: int = 1) -> None:
        super().__init__()
        self.n_norms = n_norms
        self.linear = nn.Linear(width, n_norms * len(self.order) * width)

    def forward(self, condition: Condition, n_columns: int = 1) -> list[Modulation]:
        """A modulation for each norm. Its vectors are views ``[B, D]``, one for each column."""
        rows = condition.project(self.linear)
        n_vectors = self.n_norms * len(self.order)
        columns = [rows[i::n_columns].chunk(n_vectors, dim=-1) for i in range(n_columns)]
        vectors = [list(of_columns) for of_columns in zip(*columns, strict=True)]
        starts = range(0, n_vectors, len(self.order))
        return [Modulation(**dict(zip(self.order, vectors[i:], strict=False))) for i in starts]


class AdaLNContinuous(AdaLNZero):
    """The modulation of a norm without a gate. Its scale comes first."""

    order = ("scale", "shift")


class Stream(NamedTuple):
    """A residual stream whose last update is still to be added: ``x + gate * update``.

    A stream has parts with vectors of their own. For video, and for text and video joined, a part
    is a column. Text is one part with a row per sample and column, ``[B * N, S, D]``.
    """

    x: list[Tensor]  # [rows, L_p, D] for each part p
    update: Tensor | None = None  # [rows, sum of L_p, D]
    gate: Vectors | None = None

    def plus(self, update: Tensor | None, gate: Vectors | None) -> Stream:
        """The stream with ``gate * update`` still to be added, and no other update."""
        return Stream(self.x, update, gate)

    def total(self) -> list[Tensor]:
        """The sum, for each part."""
        if self.update is None or self.gate is None:
            return self.x
        parts = zip(self.x, self.gate, self._updates(), strict=True)
        return [torch.addcmul(x, gate[:, None], f) for x, gate, f in parts]

    def last(self, lengths: list[int]) -> Stream:
        """The last tokens of each part."""
        x = [x[:, x.shape[1] - n :] for x, n in zip(self.x, lengths, strict=True)]
        if self.update is None:
            return Stream(x)
        updates = [f[:, f.shape[1] - n :] for f, n in zip(self._updates(), lengths, strict=True)]
        return Stream(x, join(updates), self.gate)

    def clipped(self) -> Stream:
        """In fp16 the sum, clipped to the range of fp16 as in the official FLUX."""
        if self.x[0].dtype != torch.float16:
            return self
        return Stream([x.clip(-FP16_MAX, FP16_MAX) for x in self.total()])

    def norm(self, modulation: Modulation, ops: Ops) -> tuple[Stream, Tensor]:
        """The stream with its update added, and ``(1 + scale) * LN(x) + shift`` of all parts,
        ``[rows, T, D]``."""
        nothing = [None] * len(self.x)
        updates = nothing if self.update is None else self._updates()
        gates = self.gate or nothing
        vectors = zip(gates, modulation.scale, modulation.shift, strict=True)
        pairs = [
            ops.residual_norm(x, f, gate=gate, scale=scale, shift=shift, norm="layer", eps=NORM_EPS)
            for x, f, (gate, scale, shift) in zip(self.x, updates, vectors, strict=True)
        ]
        return Stream([h for h, _ in pairs]), join([a for _, a in pairs])

    def _updates(self) -> list[Tensor]:
        assert self.update is not None
        return split(self.update, [x.shape[1] for x in self.x])


def join_text(text: Stream, video: Stream) -> Stream:
    """Text before the video of each column, ``[B, S + L, D]``."""
    (rows,), n_columns = text.total(), len(video.x)  # sample by sample, column by column
    parts = enumerate(video.total())
    return Stream([torch.cat([rows[i::n_columns], x], dim=1) for i, x in parts])


class DualBlock(nn.Module):
    """Text and video with weights of their own, which attend to each other.

    With ``drops_text`` (MM-DiT's last block) text gives keys and values only.
    """

    def __init__(self, width: int, attention: JointAttention, drops_text: bool = False) -> None:
        super().__init__()
        self.norm1 = AdaLNZero(width, 2)
        self.norm1_context = AdaLNContinuous(width) if drops_text else AdaLNZero(width, 2)
        self.attn = attention
        self.ff = FeedForward(width)
        self.ff_context = None if drops_text else FeedForward(width)

    def forward(
        self,
        text: Stream | None,
        video: Stream,
        condition: Condition,
        packing: Packing,
        ops: Ops,
        cache: BlockCache | None = None,
    ) -> tuple[Stream | None, Stream]:
        """Both streams. Text is None where a cache holds its keys and values."""
        first, second = self.norm1(condition, len(packing.columns))
        video, a = video.norm(first, ops)
        text_a, text_modulation = None, []
        if text is not None:
            text_modulation = self.norm1_context(condition)
            text, text_a = text.norm(text_modulation[0], ops)

        text_update, update = self.attn(text_a, a, packing, ops, cache)

        if packing.only_current:
            video = video.last(packing.current_lengths)
        video, a = video.plus(update, first.gate).norm(second, ops)
        video = video.plus(self.ff(a), second.gate)
        if text is not None and self.ff_context is not None:
            first, second = text_modulation
            text, text_a = text.plus(text_update, first.gate).norm(second, ops)
            text = text.plus(self.ff_context(text_a), second.gate)
        return text, video


class SingleBlock(nn.Module):
    """Text and video as one sequence, with attention and feed-forward side by side."""

    def __init__(self, width: int, attention: Attention) -> None:
        super().__init__()
        self.norm = AdaLNZero(width)
        self.proj_mlp = nn.Linear(width, 4 * width)
        self.proj_out = nn.Linear(5 * width, width)
        self.attn = attention

    def forward(
        self,
        joint: Stream,
        condition: Condition,
        packing: Packing,
        ops: Ops,
        cache: BlockCache | None = None,
    ) -> Stream:
        (modulation,) = self.norm(condition, len(packing.columns))
        joint, a = joint.norm(modulation, ops)
        attended = self.attn(a, packing, ops, cache)
        if packing.only_current:
            joint = joint.last(packing.current_lengths)
            a = a[:, a.shape[1] - packing.current_lengths[0] :]
        inner = F.gelu(self.proj_mlp(a), approximate="tanh")
        update = self.proj_out(torch.cat([attended, inner], dim=-1))
        return joint.plus(update, modulation.gate)


class TwoLayers(nn.Module):
    def __init__(self, n_in: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(n_in, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class TimeTextEmbedding(nn.Module):
    """``c = MLP(cos and sin of t) + MLP(pooled text)``, a vector per sample and column.

    The second term is an input of `forward`: it stays the same while a video is made.
    """

    N_FREQUENCIES = 128

    def __init__(self, n_pooled: int, width: int) -> None:
        super().__init__()
        self.timestep_embedder = TwoLayers(2 * self.N_FREQUENCIES, width)
        self.text_embedder = TwoLayers(n_pooled, width)

    def forward(self, timestep: Tensor, embedded_text: Tensor) -> Tensor:
        """c ``[B * N, D]``; the timesteps ``[B * N]`` are 0 to 1000, the text ``[B * N, D]``."""
        t = timestep.to(torch.promote_types(timestep.dtype, torch.float32))
        j = torch.arange(self.N_FREQUENCIES, dtype=t.dtype, device=t.device)
        angle = t[:, None] * torch.exp(j * (-math.log(10000.0) / self.N_FREQUENCIES))
        features = torch.cat([angle.cos(), angle.sin()], dim=-1).to(embedded_text.dtype)
        return self.timestep_embedder(features) + embedded_text
