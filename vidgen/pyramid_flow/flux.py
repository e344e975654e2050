"""miniFLUX, the larger of Pyramid Flow's transformers (`PyramidFluxTransformer`, 2.0 B).

Blocks with separate weights for text and video, then blocks on both as one sequence. Positions are
rotary along time, row and column.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vidgen.ops import EAGER, Ops

from .config import FluxConfig
from .layers import Attention, DualBlock, JointAttention, SingleBlock, Stream
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

    def run(self, text: Stream, video: Stream, c: Tensor, packing: Packing) -> Stream:
        for i in range(len(self.transformer_blocks)):
            text, video = self.run_block(i, self.transformer_blocks, text, video, c, packing)
            text = text.clipped()
        n_columns = len(packing.columns)
        (text_rows,) = text.total()  # sample by sample, column by column
        columns = enumerate(video.total())
        joint = Stream([torch.cat([text_rows[i::n_columns], x], dim=1) for i, x in columns])
        for i in range(len(self.single_transformer_blocks)):
            joint = self.run_block(i, self.single_transformer_blocks, joint, c, packing)
            joint = joint.clipped()
        return joint

    def checkpoints(self, index: int, n_blocks: int) -> bool:
        """The first blocks of each kind."""
        return index <= int(n_blocks * self.config.gradient_checkpointing_ratio)
