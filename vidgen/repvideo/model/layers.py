"""CogVideoX's blocks: text and video are one sequence, but each has its own modulation.

    x <- x + gate1 * attention(LN(x) * (1 + scale1) + shift1)
    x <- x + gate2 * MLP(LN(x) * (1 + scale2) + shift2)

A block does not add its last update ``gate2 * MLP(...)`` itself: it returns a `Stream`, the sum so
far and the pending update. So one operator of the next block adds the update, mixes the sum with
the outputs of earlier layers (RepVideo's feature cache), normalises and modulates. Shift, scale and
gate are vectors ``[B, D]``, computed from the time embedding.

Shapes: B batch, S text tokens, N all tokens (text first), D width, E time embedding, H heads.
Module names are those of diffusers' checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidgen.common.layers import FeedForward
from vidgen.ops import Modulation, Ops, QKVStream

from .config import LAYER_NORM_EPS, QK_NORM_EPS, ROPE_THETA, CogVideoXConfig

# (x, update, gate=, scale=, ...) -> the sum, its modulated norm. It is `Ops.residual_norm`, or the
# `segment` of a feature cache, which also mixes the sum with earlier outputs.
Join = Callable[..., tuple[Tensor, Tensor]]


class Pass(NamedTuple):
    """What the layers of one pass share."""

    c: Tensor  # SiLU of the time embedding, [B, E]
    text_length: int  # S
    positions: Tensor | None  # of the video tokens, [N - S, 3]; None without rotary positions


class Stream(NamedTuple):
    """The residual stream ``x + gate * update``; the text tokens have a gate of their own.

    Without an update it is ``x`` alone.
    """

    x: Tensor  # [B, N, D]
    update: Tensor | None = None  # [B, N, D]
    gate: Tensor | None = None  # [B, D]
    text_gate: Tensor | None = None  # [B, D]

    def total(self, text_length: int) -> Tensor:
        """The sum, ``[B, N, D]``."""
        if self.update is None or self.gate is None or self.text_gate is None:
            return self.x
        parts = (self.text_gate, slice(text_length)), (self.gate, slice(text_length, None))
        return torch.cat(
            [
                torch.addcmul(self.x[:, part], gate[:, None], self.update[:, part])
                for gate, part in parts
            ],
            dim=1,
        )


class Vectors(NamedTuple):
    """Modulation of a norm and the gate of the sublayer after it, each ``[B, D]``."""

    shift: Tensor
    scale: Tensor
    gate: Tensor
    text_shift: Tensor
    text_scale: Tensor
    text_gate: Tensor


class AdaptiveNorm(nn.Module):
    """A LayerNorm for text and video, and the projection of the time embedding to `Vectors`."""

    def __init__(self, width: int, n_time: int) -> None:
        super().__init__()
        self.linear = nn.Linear(n_time, len(Vectors._fields) * width)
        self.norm = nn.LayerNorm(width, LAYER_NORM_EPS)

    def vectors(self, c: Tensor) -> Vectors:
        """Views of the projection of ``c`` ``[B, E]``."""
        return Vectors(*self.linear(c).chunk(len(Vectors._fields), dim=-1))

    def join(
        self, join: Join, stream: Stream, vectors: Vectors, text_length: int
    ) -> tuple[Tensor, Tensor]:
        """The stream with its update added (and mixed, by a cache), and its modulated norm."""
        return join(
            stream.x,
            stream.update,
            gate=stream.gate,
            scale=vectors.scale,
            shift=vectors.shift,
            text=Modulation(stream.text_gate, vectors.text_scale, vectors.text_shift),
            text_length=text_length,
            weight=self.norm.weight,
            bias=self.norm.bias,
            eps=self.norm.eps,
        )


class Attention(nn.Module):
    """Full attention; queries and keys are normalised, those of the video may be rotated."""

    def __init__(self, config: CogVideoXConfig) -> None:
        super().__init__()
        width, head_dim = config.width, config.attention_head_dim
        self.n_heads, self.axes = config.num_attention_heads, config.axes
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.norm_q = nn.LayerNorm(head_dim, QK_NORM_EPS)
        self.norm_k = nn.LayerNorm(head_dim, QK_NORM_EPS)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, a: Tensor, shared: Pass, ops: Ops) -> Tensor:
        """``a`` and the result ``[B, N, D]``."""
        q, k, v = self.heads(a, shared, ops)
        return self.to_out[0](ops.attention(q, k, v).transpose(1, 2).flatten(2))

    def heads(self, a: Tensor, shared: Pass, ops: Ops) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v ``[B, H, N, D / H]``; q and k normalised and rotated."""
        stream = QKVStream(
            (self.to_q(a), self.to_k(a), self.to_v(a)),
            self.norm_q.weight,
            self.norm_k.weight,
            self.norm_q.bias,
            self.norm_k.bias,
        )
        return ops.qk_norm_rope(
            stream,
            shared.positions,
            self.axes,
            n_heads=self.n_heads,
            text_length=shared.text_length,
            norm="layer",
            eps=QK_NORM_EPS,
            theta=ROPE_THETA,
        )


class Block(nn.Module):
    """Attention and feed-forward on one sequence."""

    def __init__(self, config: CogVideoXConfig) -> None:
        super().__init__()
        self.norm1 = AdaptiveNorm(config.width, config.time_embed_dim)
        self.attn1 = Attention(config)
        self.norm2 = AdaptiveNorm(config.width, config.time_embed_dim)
        self.ff = FeedForward(config.width)

    def forward(self, stream: Stream, shared: Pass, join: Join, ops: Ops) -> Stream:
        """The stream with the result of the feed-forward as pending update.

        Args:
            join: the operator at the first norm; at the second it is `Ops.residual_norm`.
        """
        n_text = shared.text_length
        first, second = self.norm1.vectors(shared.c), self.norm2.vectors(shared.c)
        h, a = self.norm1.join(join, stream, first, n_text)
        stream = Stream(h, self.attn1(a, shared, ops), first.gate, first.text_gate)
        h, a = self.norm2.join(ops.residual_norm, stream, second, n_text)
        return Stream(h, self.ff(a), second.gate, second.text_gate)


class TimeEmbedding(nn.Module):
    """A number per sample to a vector: sinusoids, then an MLP of two layers."""

    def __init__(self, n_sinusoids: int, width: int) -> None:
        super().__init__()
        self.n_sinusoids = n_sinusoids
        self.linear_1 = nn.Linear(n_sinusoids, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """``t`` [B] to ``[B, E]``."""
        return self.linear_2(F.silu(self.linear_1(self.sinusoids(t).to(dtype))))

    def sinusoids(self, t: Tensor) -> Tensor:
        """``[B, n_sinusoids]``: cosines, then sines, in fp32 as the released code has them."""
        n = self.n_sinusoids // 2
        k = torch.arange(n, dtype=torch.float32, device=t.device)
        angle = t[:, None].float() * torch.exp(k * (-math.log(10000.0) / n))
        return torch.cat([angle.cos(), angle.sin()], dim=-1)


class PatchEmbedding(nn.Module):
    """Text features and latent patches to the tokens of one sequence."""

    def __init__(self, config: CogVideoXConfig) -> None:
        super().__init__()
        self.patch, self.patch_t = config.patch_size, config.patch_size_t
        if self.patch_t is None:
            self.proj = nn.Conv2d(
                config.in_channels, config.width, self.patch, self.patch, bias=config.patch_bias
            )
        else:
            n_in = config.in_channels * self.patch_t * self.patch**2
            self.proj = nn.Linear(n_in, config.width)
        self.text_proj = nn.Linear(config.text_embed_dim, config.width)

    def forward(self, text: Tensor, latents: Tensor, table: Tensor | None) -> Tensor:
        """``[B, N, D]``.

        Args:
            text: ``[B, S, W]``
            latents: ``[B, T, C, h, w]``
            table: position embeddings that are added to the video tokens, ``[N - S, D]``
        """
        if self.patch_t is None:
            video = self.proj(latents.flatten(0, 1)).flatten(2).transpose(1, 2)
            video = video.reshape(len(latents), -1, video.shape[-1])
        else:
            video = self.proj(patchify(latents, self.patch, self.patch_t))
        if table is not None:
            video = video + table.to(video.dtype)
        return torch.cat([self.text_proj(text), video], dim=1)


def patchify(latents: Tensor, patch: int, patch_t: int) -> Tensor:
    """``[B, T, C, h, w]`` to ``[B, patches, features]``.

    The features of a patch are in the order channel, frame, row, column.
    """
    x = latents.unflatten(4, (-1, patch)).unflatten(3, (-1, patch)).unflatten(1, (-1, patch_t))
    # [B, T', pt, C, h', p, w', p]
    return x.permute(0, 1, 4, 6, 3, 2, 5, 7).flatten(4).flatten(1, 3)


def unpatchify(x: Tensor, grid: tuple[int, int, int], patch: int, patch_t: int) -> Tensor:
    """The inverse of `patchify`."""
    x = x.unflatten(2, (-1, patch_t, patch, patch)).unflatten(1, grid)
    # [B, T', h', w', C, pt, p, p]
    x = x.permute(0, 1, 5, 4, 2, 6, 3, 7)
    return x.flatten(6, 7).flatten(4, 5).flatten(1, 2)
