"""miniFLUX, the larger of Pyramid Flow's transformers (`PyramidFluxTransformer`, 2.0 B).

Blocks with separate weights for text and video, then blocks on both as one sequence. Positions are
rotary along time, row and column.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vidgen.ops import EAGER, Ops

from .attention import Attention, JointAttention
from .config import FluxConfig
from .kv_cache import BlockCache
from .layers import Condition, DualBlock, SingleBlock, Stream
from .sequence import Packing, patchify
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

    def embed(self, clips: Sequence[Sequence[Tensor]], packing: Packing) -> Tensor:
        patches = [patchify(clip) for column in clips for clip in column]
        return self.x_embedder(torch.cat(patches, dim=1))

    def run(
        self,
        text: Stream | None,
        video: Stream,
        c: Tensor | Condition,
        packing: Packing,
        caches: Sequence[BlockCache | None],
    ) -> Stream:
        n_dual, n_columns = len(self.transformer_blocks), len(packing.columns)
        for i, cache in enumerate(caches[:n_dual]):
            text, video = self.run_block(
                i, self.transformer_blocks, (text, video, c, packing), cache
            )
            text = None if text is None else text.clipped()
        joint = video
        if text is not None:
            (text_rows,) = text.total()  # sample by sample, column by column
            columns = enumerate(video.total())
            joint = Stream([torch.cat([text_rows[i::n_columns], x], dim=1) for i, x in columns])
        for i, cache in enumerate(caches[n_dual:]):
            is_last = n_dual + i == len(caches) - 1
            p = packing.last_block if is_last and packing.last_block else packing
            joint = self.run_block(i, self.single_transformer_blocks, (joint, c, p), cache)
            joint = joint.clipped()
        return joint

    def checkpoints(self, index: int, n_blocks: int) -> bool:
        """The first blocks of each kind."""
        return index <= int(n_blocks * self.config.gradient_checkpointing_ratio)
