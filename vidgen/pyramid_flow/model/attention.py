"""Attention over text and video as one sequence, with an optional cache of keys and values.

`layers` calls it in every block. Queries and keys pass an RMS norm over the head dim and a
rotation by their positions (`Ops.qk_norm_rope`).

Shapes: B batch rows, N columns, S text tokens, L video tokens of a column, T all tokens of the
packed sequence, D width, H heads, hd head dim. Module names are those of the checkpoints.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vidgen.ops import Ops, QKVStream

from .kv_cache import BlockCache
from .sequence import Packing


class HeadNorm(nn.Module):
    """The weight of an RMS norm over the head dim."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))


def attend(
    ops: Ops, q: Tensor, k: Tensor, v: Tensor, packing: Packing, cache: BlockCache | None
) -> Tensor:
    """Attention to the keys of this call and, with a cache, to the past keys in it.

    q, k and v are ``[B, H, T, hd]``. With ``packing.only_current``, only the queries of the clip
    being made are taken. Past and new keys are not copied together. Instead attention runs twice,
    and with l the log-sum-exp of the scores, attention to both is

        out = out_new + sigmoid(l_past - l_new) (out_past - out_new)
    """
    if packing.only_current:
        q = q[:, :, q.shape[2] - packing.current_lengths[0] :]
    if cache is not None:
        cache.write(k, v)
    if cache is None or packing.past_mask is None:
        return ops.interval_attention(q, k, v, packing.mask)
    out, lse = ops.interval_attention(q, k, v, packing.mask, return_lse=True)
    past = cache.read(q.device)
    past_out, past_lse = ops.interval_attention(q, *past, packing.past_mask, return_lse=True)
    weight = (past_lse - lse).sigmoid()[..., None].to(out.dtype)
    return torch.lerp(out, past_out, weight)


class Attention(nn.Module):
    """Self-attention over one packed sequence, text included. It has no output projection."""

    def __init__(self, width: int, n_heads: int, axes: tuple[int, ...], eps: float) -> None:
        super().__init__()
        self.n_heads, self.axes, self.eps = n_heads, axes, eps
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.norm_q = HeadNorm(width // n_heads)
        self.norm_k = HeadNorm(width // n_heads)

    def project(self, x: Tensor) -> QKVStream:
        projections = self.to_q(x), self.to_k(x), self.to_v(x)
        return QKVStream(projections, self.norm_q.weight, self.norm_k.weight)

    def forward(
        self, x: Tensor, packing: Packing, ops: Ops, cache: BlockCache | None = None
    ) -> Tensor:
        """From ``x`` ``[B, T, D]`` to the output of every query, ``[B, T or fewer, D]``."""
        q, k, v = ops.qk_norm_rope(
            self.project(x),
            packing.positions,
            self.axes,
            n_heads=self.n_heads,
            norm="rms",
            eps=self.eps,
        )
        return attend(ops, q, k, v, packing, cache).transpose(1, 2).flatten(2)


class JointAttention(Attention):
    """Attention over text and video, each with projections and norms of its own."""

    def __init__(
        self,
        width: int,
        n_heads: int,
        axes: tuple[int, ...],
        eps: float,
        text_norm: str,
        drops_text: bool = False,
    ) -> None:
        """``text_norm``: the checkpoint's name for the norms of the text's queries and keys."""
        super().__init__(width, n_heads, axes, eps)
        self.add_q_proj = nn.Linear(width, width)
        self.add_k_proj = nn.Linear(width, width)
        self.add_v_proj = nn.Linear(width, width)
        self.text_norm = text_norm
        self.add_module(f"{text_norm}_q", HeadNorm(width // n_heads))
        self.add_module(f"{text_norm}_k", HeadNorm(width // n_heads))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.to_add_out = None if drops_text else nn.Linear(width, width)

    def project_text(self, text: Tensor) -> QKVStream:
        projections = self.add_q_proj(text), self.add_k_proj(text), self.add_v_proj(text)
        q_weight, k_weight = (getattr(self, f"{self.text_norm}_{x}").weight for x in "qk")
        return QKVStream(projections, q_weight, k_weight)

    def forward(
        self,
        text: Tensor | None,
        video: Tensor,
        packing: Packing,
        ops: Ops,
        cache: BlockCache | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        """The outputs for text and video.

        Args:
            text: ``[B * N, S, D]``; None where a cache holds its keys and values.
            video: ``[B, sum of L, D]``.

        Returns:
            For text, of the same shape, or None where the output is not used; for the video's
            queries, ``[B, T, D]``.
        """
        if text is None:
            return None, self.to_out[0](super().forward(video, packing, ops, cache))
        n_columns = len(packing.columns)
        text_qkv, video_qkv = self.project_text(text), self.project(video)
        video_columns = zip(*map(packing.split_video, video_qkv.projections), strict=True)
        parts = [
            ops.qk_norm_rope(
                video_qkv._replace(projections=projections),
                positions,
                self.axes,
                n_heads=self.n_heads,
                text=text_qkv._replace(
                    projections=tuple(x[i::n_columns] for x in text_qkv.projections)
                ),
                norm="rms",
                eps=self.eps,
            )
            for i, (projections, positions) in enumerate(
                zip(video_columns, packing.video_positions, strict=True)
            )
        ]
        q, k, v = (x[0] if n_columns == 1 else torch.cat(x, 2) for x in zip(*parts, strict=True))
        out = attend(ops, q, k, v, packing, cache)
        if packing.only_current:
            return None, self.to_out[0](out.transpose(1, 2).flatten(2))
        text_out, video_out = packing.split_heads(out)
        text_update = None if self.to_add_out is None else self.to_add_out(text_out)
        return text_update, self.to_out[0](video_out)
