"""What Pyramid Flow's two transformers share: inputs, packing, the way out.

A model is called with columns of clips (see `sequence`) and predicts the velocity, noise minus
data, of the last clip of each column. Weights and results do not depend on `ops`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vidgen.ops import EAGER, Ops

from .config import PATCH, FluxConfig, MMDiTConfig
from .layers import Conditioning, Modulation, Stream, adaptive_norm
from .sequence import Packing, grids_of, pack, unpatchify


class PyramidTransformer(nn.Module):
    """The common part. A model embeds patches (`embed`) and runs its blocks (`run`)."""

    def __init__(
        self, config: FluxConfig | MMDiTConfig, axes: tuple[int, ...], ops: Ops = EAGER
    ) -> None:
        """``axes``: how many channels of a head turn along each axis of its position."""
        super().__init__()
        self.config, self.axes, self.ops = config, axes, ops
        self.time_text_embed = Conditioning(config.pooled_projection_dim, config.width)
        self.context_embedder = nn.Linear(config.joint_attention_dim, config.width)
        self.norm_out = Modulation(config.width, 2)
        self.proj_out = nn.Linear(config.width, PATCH * PATCH * config.latent_channels)

    def embed(self, clips: Sequence[Sequence[Tensor]], packing: Packing) -> Tensor:
        """Tokens of all columns ``[B, sum of L, D]``."""
        raise NotImplementedError

    def run(self, text: Stream, video: Stream, c: Tensor, packing: Packing) -> Stream:
        """All blocks; a stream with the tokens of the last clips at the end of each part."""
        raise NotImplementedError

    def checkpoints(self, index: int, n_blocks: int) -> bool:
        """Whether a block keeps only its inputs for the backward."""
        raise NotImplementedError

    def forward(
        self,
        columns: Sequence[Sequence[Tensor]],
        timestep: Tensor,
        text: Tensor,
        text_mask: Tensor | None,
        pooled: Tensor,
        *,
        causal: bool | None = None,
        packing: Packing | None = None,
    ) -> list[Tensor]:
        """Velocities of the clips being made, ``[B, C, t, h, w]`` for each column.

        Args:
            columns: per column the clips ``[B, C, t, h, w]``, oldest first; h and w even.
            timestep: 0 to 1000, ``[B * columns]``; samples first, then columns, as the next three.
            text: T5 features ``[B * columns, S, joint_attention_dim]``.
            text_mask: ``[B * columns, S]``, zero for the padding at the end; None: no padding.
            pooled: CLIP features ``[B * columns, pooled_projection_dim]``.
            causal: whether frames see only the frames before them; default as the config says.
            packing: what `pack` gave for clips of these sizes; a sampler saves building it at
                every step. ``text_mask`` and ``causal`` are those it was made with.

        Raises:
            ValueError: shapes that do not fit, padding before text.
        """
        if packing is None:
            packing = self.pack(columns, text, text_mask, causal=causal)
        packing.check(timestep=timestep, text=text, pooled=pooled)

        c = F.silu(self.time_text_embed(timestep, pooled))
        text_stream = Stream([self.context_embedder(text)])
        video = Stream(packing.split_video(self.embed(columns, packing)))
        video = self.run(text_stream, video, c, packing)
        return self.read_out(video.last(packing.current_lengths), c, packing)

    def pack(
        self,
        columns: Sequence[Sequence[Tensor]],
        text: Tensor,
        text_mask: Tensor | None,
        *,
        causal: bool | None = None,
    ) -> Packing:
        """Mask and positions of a call; arguments and errors as those of `forward`."""
        grids = grids_of(columns, self.config.latent_channels)
        causal = self.config.use_temporal_causal if causal is None else causal
        text_mask = text_mask if self.uses_text_mask else None
        return pack(grids, len(columns[0][0]), text, text_mask, causal, len(self.axes))

    @property
    def uses_text_mask(self) -> bool:
        return True

    def read_out(self, current: Stream, c: Tensor, packing: Packing) -> list[Tensor]:
        scale, shift = self.norm_out(c, len(packing.columns))
        _, a = adaptive_norm(self.ops, current, shift, scale)
        patches = self.proj_out(a).split(packing.current_lengths, dim=1)
        return [
            unpatchify(x, column[-1]) for x, column in zip(patches, packing.columns, strict=True)
        ]

    def run_block(self, index: int, blocks: nn.ModuleList, *args: Any) -> Any:
        block: Callable[..., Any] = blocks[index]
        trains = self.training and self.config.use_gradient_checkpointing
        if trains and self.checkpoints(index, len(blocks)):
            return checkpoint(block, *args, self.ops, use_reentrant=False)
        return block(*args, self.ops)

    def initialize(self) -> None:
        """As the official models start: what they predict is 0."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        for two in (self.time_text_embed.timestep_embedder, self.time_text_embed.text_embedder):
            nn.init.normal_(two.linear_1.weight, std=0.02)
            nn.init.normal_(two.linear_2.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, Modulation):
                nn.init.zeros_(module.linear.weight)
        nn.init.zeros_(self.proj_out.weight)
