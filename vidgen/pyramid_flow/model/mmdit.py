"""Pyramid Flow's transformer of Stable Diffusion 3's type (`PyramidDiffusionMMDiT`, 2.0 B).

Blocks with separate weights for text and video. Positions in the picture are added to the tokens
from a table, time is rotary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidgen.ops import EAGER, Ops

from .attention import JointAttention
from .config import PATCH, MMDiTConfig
from .kv_cache import BlockCache
from .layers import Condition, DualBlock, Stream
from .positions import Column, sincos_table, spatial_embedding
from .sequence import Packing, patchify
from .transformer import PyramidTransformer

QK_EPS = 1e-5


class PatchEmbedding(nn.Module):
    """Patches to tokens, each with the embedding of its place in the picture."""

    pos_embed: Tensor

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.interpolate = config.interp_condition_pos
        self.n_side = config.pos_embed_max_size
        spacing = config.sample_size / PATCH / self.n_side
        table = sincos_table(config.width, self.n_side, spacing)
        self.register_buffer("pos_embed", table.flatten(0, 1)[None])
        self.proj = nn.Conv2d(config.in_channels, config.width, PATCH, stride=PATCH)

    def forward(self, clips: Sequence[Sequence[Tensor]], packing: Packing) -> Tensor:
        """``[B, sum of L, D]``; the convolution is a product of patches and weights."""
        patches = torch.cat([patchify(clip) for column in clips for clip in column], dim=1)
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)  # channels last as in a patch
        tokens = F.linear(patches, weight, self.proj.bias)
        assert packing.embeddings is not None  # of this model's packings
        return (tokens + packing.embeddings).to(tokens.dtype)

    def places(self, columns: tuple[Column, ...]) -> Tensor:
        """Embeddings of where the tokens are in the picture, ``[sum of L, D]``."""
        table = self.pos_embed[0].unflatten(0, (self.n_side, self.n_side))
        parts = [
            spatial_embedding(table, (rows, cols), column[-1][1:], self.interpolate).repeat(
                frames, 1
            )
            for column in columns
            for frames, rows, cols in column
        ]
        return torch.cat(parts)


class PyramidDiffusionMMDiT(PyramidTransformer):
    config: MMDiTConfig

    def __init__(self, config: MMDiTConfig | None = None, ops: Ops = EAGER) -> None:
        config = config or MMDiTConfig()
        width, n_heads = config.width, config.num_attention_heads
        axes = (config.attention_head_dim,) if config.add_temp_pos_embed else ()
        super().__init__(config, axes, ops)
        self.pos_embed = PatchEmbedding(config)
        drops_text = [i == config.num_layers - 1 for i in range(config.num_layers)]
        self.transformer_blocks = nn.ModuleList(
            DualBlock(width, JointAttention(width, n_heads, axes, QK_EPS, "norm_add", drops), drops)
            for drops in drops_text
        )
        self.initialize()

    def embed(self, clips: Sequence[Sequence[Tensor]], packing: Packing) -> Tensor:
        return self.pos_embed(clips, packing)

    def embed_places(self, columns: tuple[Column, ...]) -> Tensor:
        return self.pos_embed.places(columns)

    def run(
        self,
        text: Stream | None,
        video: Stream,
        c: Tensor | Condition,
        packing: Packing,
        caches: Sequence[BlockCache | None],
    ) -> Stream:
        for i, cache in enumerate(caches):
            is_last = i == len(caches) - 1
            p = packing.last_block if is_last and packing.last_block else packing
            text, video = self.run_block(i, self.transformer_blocks, (text, video, c, p), cache)
        return video

    def checkpoints(self, index: int, n_blocks: int) -> bool:
        """The last blocks."""
        return index >= int(n_blocks * self.config.gradient_checkpointing_ratio)
