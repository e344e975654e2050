"""The blocks of Pyramid Flow's transformers: adaptive norms, feed-forward, what `attention` joins.

The residual stream of a modality is kept with the update that has not been added to it yet
(`Stream`), so that one operator adds it, normalises the sum and modulates it for the next layer.
Modulation is one vector per sample and column, ``[B, D]``, never a row per token.

Shapes: B batch rows, N columns, S text tokens, L video tokens of a column, T all tokens of the
packed sequence, D width, H heads, hd head dim. Module names are those of the checkpoints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidgen.common.layers import FeedForward
from vidgen.ops import Ops

from .attention import Attention, JointAttention
from .kv_cache import BlockCache
from .sequence import Packing, split

NORM_EPS = 1e-6
FP16_MAX = 65504.0

Vectors = list[Tensor]  # a modulation vector [rows, D] for each part of a stream


class Stream(NamedTuple):
    """Residual streams ``x_p + gate_p * update_p`` of the parts of a packed sequence.

    Video and joint streams have a part per column; that of text is one part, a row per sample and
    column, ``[B * N, S, D]``.
    """

    x: list[Tensor]  # [rows, L_p, D]
    update: Tensor | None = None  # [rows, sum of L_p, D]
    gate: Vectors | None = None

    @property
    def updates(self) -> list[Tensor]:
        assert self.update is not None
        return split(self.update, [x.shape[1] for x in self.x])

    def total(self) -> list[Tensor]:
        """The sum of each part."""
        if self.update is None or self.gate is None:
            return self.x
        parts = zip(self.x, self.gate, self.updates, strict=True)
        return [torch.addcmul(x, gate[:, None], f) for x, gate, f in parts]

    def last(self, lengths: list[int]) -> Stream:
        """The last tokens of each part."""
        x = [x[:, x.shape[1] - n :] for x, n in zip(self.x, lengths, strict=True)]
        if self.update is None:
            return Stream(x)
        updates = [f[:, f.shape[1] - n :] for f, n in zip(self.updates, lengths, strict=True)]
        return Stream(x, join(updates), self.gate)

    def clipped(self) -> Stream:
        """Within the range of fp16 where that is the dtype, as the official FLUX keeps its text."""
        if self.x[0].dtype != torch.float16:
            return self
        return Stream([x.clip(-FP16_MAX, FP16_MAX) for x in self.total()])


def join(parts: list[Tensor]) -> Tensor:
    """Parts one after another along the tokens; a single one as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def adaptive_norm(
    ops: Ops, stream: Stream, shift: Vectors, scale: Vectors
) -> tuple[Stream, Tensor]:
    """Adds the pending update; the sum, and ``LN(sum) * (1 + scale) + shift`` ``[rows, T, D]``."""
    updates = [None] * len(stream.x) if stream.update is None else stream.updates
    gates = stream.gate or [None] * len(stream.x)
    parts = zip(stream.x, updates, gates, scale, shift, strict=True)
    pairs = [
        ops.residual_norm(x, f, gate=gate, scale=scale, shift=shift, norm="layer", eps=NORM_EPS)
        for x, f, gate, scale, shift in parts
    ]
    return Stream([h for h, _ in pairs]), join([a for _, a in pairs])


@dataclass(frozen=True, eq=False)
class Condition:
    """SiLU of the conditioning, and the modulation vectors of every layer that has seen it.

    Who calls a model with the same timestep again, and the same pooled text, saves computing them.
    """

    c: Tensor  # [rows, D]
    vectors: dict[nn.Module, Tensor] = field(default_factory=dict)

    def apply(self, linear: nn.Module) -> Tensor:
        if linear not in self.vectors:
            self.vectors[linear] = linear(self.c)
        return self.vectors[linear]


class Modulation(nn.Module):
    """``n_vectors`` modulation vectors from the conditioning, which SiLU has been applied to."""

    def __init__(self, width: int, n_vectors: int) -> None:
        super().__init__()
        self.n_vectors = n_vectors
        self.linear = nn.Linear(width, n_vectors * width)

    def forward(self, c: Tensor | Condition, n_columns: int = 1) -> list[Vectors]:
        """``c`` [B * N, D] to each vector's list over the columns of views ``[B, D]``."""
        rows = c.apply(self.linear) if isinstance(c, Condition) else self.linear(c)
        columns = [rows[i::n_columns].chunk(self.n_vectors, dim=-1) for i in range(n_columns)]
        return [list(vectors) for vectors in zip(*columns, strict=True)]


class DualBlock(nn.Module):
    """Text and video with weights of their own that meet in attention.

    With ``drops_text`` (MM-DiT's last block) text only gives keys and values.
    """

    def __init__(self, width: int, attention: JointAttention, drops_text: bool = False) -> None:
        super().__init__()
        self.norm1 = Modulation(width, 6)
        self.norm1_context = Modulation(width, 2 if drops_text else 6)
        self.attn = attention
        self.ff = FeedForward(width)
        self.ff_context = None if drops_text else FeedForward(width)

    def forward(
        self,
        text: Stream | None,
        video: Stream,
        c: Tensor | Condition,
        packing: Packing,
        ops: Ops,
        cache: BlockCache | None = None,
    ) -> tuple[Stream | None, Stream]:
        """Both streams; text is None where a cache holds it."""
        shift, scale, gate, shift_ff, scale_ff, gate_ff = self.norm1(c, len(packing.columns))
        video, a = adaptive_norm(ops, video, shift, scale)
        text_a, text_rest = None, []
        if text is not None:
            if self.ff_context is None:  # in this norm the scale comes first
                text_scale, text_shift = self.norm1_context(c)
            else:
                text_shift, text_scale, *text_rest = self.norm1_context(c)
            text, text_a = adaptive_norm(ops, text, text_shift, text_scale)

        text_update, update = self.attn(text_a, a, packing, ops, cache)

        if packing.only_current:
            video = video.last(packing.current_lengths)
        video, a = adaptive_norm(ops, Stream(video.x, update, gate), shift_ff, scale_ff)
        video = Stream(video.x, self.ff(a), gate_ff)
        if text is not None and self.ff_context is not None:
            gate, shift_ff, scale_ff, gate_ff = text_rest
            text, text_a = adaptive_norm(ops, Stream(text.x, text_update, gate), shift_ff, scale_ff)
            text = Stream(text.x, self.ff_context(text_a), gate_ff)
        return text, video


class SingleBlock(nn.Module):
    """Text and video as one sequence; attention and feed-forward side by side."""

    def __init__(self, width: int, attention: Attention) -> None:
        super().__init__()
        self.norm = Modulation(width, 3)
        self.proj_mlp = nn.Linear(width, 4 * width)
        self.proj_out = nn.Linear(5 * width, width)
        self.attn = attention

    def forward(
        self,
        joint: Stream,
        c: Tensor | Condition,
        packing: Packing,
        ops: Ops,
        cache: BlockCache | None = None,
    ) -> Stream:
        shift, scale, gate = self.norm(c, len(packing.columns))
        joint, a = adaptive_norm(ops, joint, shift, scale)
        attended = self.attn(a, packing, ops, cache)
        if packing.only_current:
            joint = joint.last(packing.current_lengths)
            a = a[:, a.shape[1] - packing.current_lengths[0] :]
        inner = F.gelu(self.proj_mlp(a), approximate="tanh")
        update = self.proj_out(torch.cat([attended, inner], dim=-1))
        return Stream(joint.x, update, gate)


class TwoLayers(nn.Module):
    def __init__(self, n_in: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(n_in, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class Conditioning(nn.Module):
    """Timestep (0 to 1000) and pooled text to one vector per sample.

    The pooled text stays the same while a video is made, so its part is computed apart.
    """

    N_FREQUENCIES = 128

    def __init__(self, n_pooled: int, width: int) -> None:
        super().__init__()
        self.timestep_embedder = TwoLayers(2 * self.N_FREQUENCIES, width)
        self.text_embedder = TwoLayers(n_pooled, width)

    def forward(self, timestep: Tensor, embedded_text: Tensor) -> Tensor:
        """``embedded_text``: `text_embedder` of the pooled text, ``[samples, D]``."""
        t = timestep.to(torch.promote_types(timestep.dtype, torch.float32))
        j = torch.arange(self.N_FREQUENCIES, dtype=t.dtype, device=t.device)
        angle = t[:, None] * torch.exp(j * (-math.log(10000.0) / self.N_FREQUENCIES))
        features = torch.cat([angle.cos(), angle.sin()], dim=-1).to(embedded_text.dtype)
        return self.timestep_embedder(features) + embedded_text
