"""miniFLUX, the larger of Pyramid Flow's two transformers (`PyramidFluxTransformer`, 2.0 B).

First come blocks with separate weights for text and video, then blocks on both as one sequence.
Positions are rotary along time, row and column. How to call it: see `transformer`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vidgen.ops import EAGER, Ops

from .attention import Attention, JointAttention
from .config import FluxConfig
from .kv_cache import BlockCache
from .layers import Condition, DualBlock, SingleBlock, Stream, join_text
from .sequence import Packing
from .transformer import PyramidTransformer

QK_EPS = 1e-6


class PyramidFluxTransformer(PyramidTransformer):
    def __init__(self, config: FluxConfig | None = None, ops: Ops = EAGER) -> None:
        config = config or FluxConfig()
        width, n_heads, axes = config.width, config.num_attention_heads, config.axes_dims_rope
        super().__init__(config, axes, ops)
        self.x_embedder = nn.Linear(config.in_channels, width)
        self.transformer_blocks = nn.ModuleList(
            DualBlock(width, JointAttention(width, n_heads, axes, QK_EPS, "norm_added"))
            for _ in range(config.num_layers)
        )
        self.single_transformer_blocks = nn.ModuleList(
            SingleBlock(width, Attention(width, n_heads, axes, QK_EPS))
            for _ in range(config.num_single_layers)
        )
        self.initialize()

    def forward(
        self,
        patches: Tensor,
        text_tokens: Tensor,
        condition: Condition,
        packing: Packing,
        caches: Sequence[BlockCache] | None = None,
    ) -> Tensor:
        video = Stream(packing.split_video(self.x_embedder(patches)))
        text = Stream([text_tokens]) if packing.text_length else None

        n_dual, n_single = len(self.transformer_blocks), len(self.single_transformer_blocks)
        block_caches = caches or [None] * (n_dual + n_single)
        blocks = self.checkpointed(self.transformer_blocks)
        for block, cache in zip(blocks, block_caches[:n_dual], strict=True):
            text, video = block(text, video, condition, packing, self.ops, cache)
            text = None if text is None else text.clipped()

        joint = video if text is None else join_text(text, video)
        blocks = self.checkpointed(self.single_transformer_blocks)
        packings = packing.per_block(n_single)
        for block, part, cache in zip(blocks, packings, block_caches[n_dual:], strict=True):
            joint = block(joint, condition, part, self.ops, cache).clipped()

        return self.norm_and_project(joint, condition, packing)

    def is_checkpointed(self, index: int, n_blocks: int) -> bool:
        """The first blocks of each kind."""
        return index <= int(n_blocks * self.config.gradient_checkpointing_ratio)
