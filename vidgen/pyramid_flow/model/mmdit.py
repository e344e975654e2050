"""Pyramid Flow's transformer in the style of Stable Diffusion 3 (`PyramidDiffusionMMDiT`, 2.0 B).

All blocks have separate weights for text and video. A table of position embeddings is added to the
tokens for their place in the picture; time is rotary. How to call it: see `transformer`.
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
from .sequence import Packing
from .transformer import PyramidTransformer

QK_EPS = 1e-5


class PatchEmbedding(nn.Module):
    """From patches to tokens, plus the embedding of their place in the picture."""

    pos_embed: Tensor

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.interpolate = config.interp_condition_pos
        self.n_side = config.pos_embed_max_size
        spacing = config.sample_size / PATCH / self.n_side
        table = sincos_table(config.width, self.n_side, spacing)
        self.register_buffer("pos_embed", table.flatten(0, 1)[None])
        self.proj = nn.Conv2d(config.in_channels, config.width, PATCH, stride=PATCH)

    def forward(self, patches: Tensor, places: Tensor) -> Tensor:
        """Tokens ``[B, T, D]`` of patches ``[B, T, 4 C]`` with the embeddings `of_places`.

        The checkpoint's convolution of stride 2 is a product of patches and weights.
        """
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)  # channels last, as in a patch
        tokens = F.linear(patches, weight, self.proj.bias)
        return (tokens + places).to(tokens.dtype)

    def of_places(self, columns: tuple[Column, ...]) -> Tensor:
        """Embeddings of where the tokens of all columns are in the picture, ``[sum of L, D]``."""
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

    def place_embeddings(self, columns: tuple[Column, ...]) -> Tensor:
        return self.pos_embed.of_places(columns)

    def forward(
        self,
        patches: Tensor,
        text_tokens: Tensor,
        condition: Condition,
        packing: Packing,
        caches: Sequence[BlockCache] | None = None,
    ) -> Tensor:
        assert packing.embeddings is not None  # this model's packings have them
        video = Stream(packing.split_video(self.pos_embed(patches, packing.embeddings)))
        text = Stream([text_tokens]) if packing.text_length else None

        blocks = self.checkpointed(self.transformer_blocks)
        packings = packing.per_block(len(blocks))
        block_caches = caches or [None] * len(blocks)
        for block, part, cache in zip(blocks, packings, block_caches, strict=True):
            text, video = block(text, video, condition, part, self.ops, cache)

        return self.norm_and_project(video, condition, packing)

    def is_checkpointed(self, index: int, n_blocks: int) -> bool:
        """The last blocks."""
        return index >= int(n_blocks * self.config.gradient_checkpointing_ratio)
