"""What Pyramid Flow's two transformers share: inputs, packing, the way out.

A model is called with columns of clips (see `sequence`) and predicts the velocity, noise minus
data, of the last clip of each column. Weights and results do not depend on `ops`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vidgen.ops import EAGER, Ops

from .config import PATCH, FluxConfig, MMDiTConfig
from .kv_cache import BlockCache
from .layers import Condition, Conditioning, Modulation, Stream, adaptive_norm
from .positions import Column
from .sequence import Packing, grids_of, pack, pack_call, unpatchify


class EmbeddedText(NamedTuple):
    """What a model makes of its text before the first block, the same at every timestep."""

    tokens: Tensor  # [B * columns, S, D]
    pooled: Tensor  # [B * columns, D]


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

    def embed_places(self, columns: tuple[Column, ...]) -> Tensor | None:
        """What `embed` adds for the places of tokens in the picture, None: nothing."""
        return None

    def run(
        self,
        text: Stream | None,
        video: Stream,
        c: Tensor | Condition,
        packing: Packing,
        caches: Sequence[BlockCache | None],
    ) -> Stream:
        """All blocks; a stream with the tokens of the last clips at the end of each part.

        ``caches`` has one for each block; ``text`` is None where they hold it.
        """
        raise NotImplementedError

    def checkpoints(self, index: int, n_blocks: int) -> bool:
        """Whether a block keeps only its inputs for the backward."""
        raise NotImplementedError

    def forward(
        self,
        columns: Sequence[Sequence[Tensor]],
        timestep: Tensor | Condition,
        text: Tensor | EmbeddedText,
        text_mask: Tensor | None = None,
        pooled: Tensor | None = None,
        *,
        causal: bool | None = None,
        packing: Packing | None = None,
        caches: Sequence[BlockCache] | None = None,
    ) -> list[Tensor]:
        """Velocities of the clips being made, ``[B, C, t, h, w]`` for each column.

        Args:
            columns: per column the clips ``[B, C, t, h, w]``, oldest first; h and w even.
            timestep: 0 to 1000, ``[B * columns]``; samples first, then columns, as the next three.
                Or what `condition` made of it, beside embedded text.
            text: T5 features ``[B * columns, S, joint_attention_dim]``, or what `embed_text` made
                of them and of ``pooled``; that is for calls with a packing.
            text_mask: ``[B * columns, S]``, zero for the padding at the end; None: no padding.
            pooled: CLIP features ``[B * columns, pooled_projection_dim]``.
            causal: whether frames see only the frames before them; default as the config says.
            packing: what `pack` gave for clips of these sizes; a sampler saves building it at
                every step. ``text_mask`` and ``causal`` are those it was made with.
            caches: one for each block, with a packing of `pack_call`; ``columns`` are the frames
                that are not in them.

        Raises:
            ValueError: shapes that do not fit, padding before text.
        """
        if not isinstance(text, EmbeddedText):
            if pooled is None:
                raise ValueError("pooled: expected features beside those of the text, got None")
            if packing is None:
                packing = self.pack(columns, text, text_mask, causal=causal)
            packing.check(text=text, pooled=pooled)
            text = self.embed_text(text, pooled)
        if packing is None:
            raise ValueError("packing: expected one beside embedded text, got None")
        if isinstance(timestep, Condition):
            c = timestep
            packing.check(timestep=c.c, text=text.tokens, pooled=text.pooled)
        else:
            packing.check(timestep=timestep, text=text.tokens, pooled=text.pooled)
            c = F.silu(self.time_text_embed(timestep, text.pooled))

        text_stream = Stream([text.tokens]) if packing.text_length else None
        video = Stream(packing.split_video(self.embed(columns, packing)))
        video = self.run(text_stream, video, c, packing, caches or [None] * self.n_blocks)
        return self.read_out(video.last(packing.current_lengths), c, packing)

    def embed_text(self, text: Tensor, pooled: Tensor) -> EmbeddedText:
        """For many calls; shapes as those of `forward`."""
        embedded = self.time_text_embed.text_embedder(pooled)
        return EmbeddedText(self.context_embedder(text), embedded)

    def condition(self, timestep: Tensor, text: EmbeddedText) -> Condition:
        """For calls at the same timestep; ``[B * columns]`` as for `forward`."""
        return Condition(F.silu(self.time_text_embed(timestep, text.pooled)))

    @property
    def n_blocks(self) -> int:
        """Of all kinds."""
        config = self.config
        return config.num_layers + getattr(config, "num_single_layers", 0)

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
        packing = pack(grids, len(columns[0][0]), text, text_mask, causal, len(self.axes))
        return replace(packing, embeddings=self.embed_places(grids))

    def pack_call(
        self,
        column: Column,
        text: Tensor,
        text_mask: Tensor | None,
        *,
        past_frames: int = 0,
        only_current: bool = False,
    ) -> Packing:
        """Mask and positions of one column that may be in part in a cache.

        Args:
            column: the sizes (frames, rows, columns) of all its clips in tokens, oldest first.
            text: ``[B, S, ...]``, of which only size and device matter.
            past_frames: the oldest frames, which caches hold and `forward` is not given.
            only_current: the last block runs on the tokens alone that are being made: the same
                results for less work.
        """
        packing = pack_call(
            column,
            len(text),
            text,
            text_mask,
            causal=self.config.use_temporal_causal,
            n_axes=len(self.axes),
            past_frames=past_frames,
            only_current=only_current,
        )
        return replace(packing, embeddings=self.embed_places(packing.columns))

    def read_out(self, current: Stream, c: Tensor | Condition, packing: Packing) -> list[Tensor]:
        scale, shift = self.norm_out(c, len(packing.columns))
        _, a = adaptive_norm(self.ops, current, shift, scale)
        patches = self.proj_out(a).split(packing.current_lengths, dim=1)
        return [
            unpatchify(x, column[-1]) for x, column in zip(patches, packing.columns, strict=True)
        ]

    def run_block(
        self,
        index: int,
        blocks: nn.ModuleList,
        args: tuple[Any, ...],
        cache: BlockCache | None = None,
    ) -> Any:
        block: Callable[..., Any] = blocks[index]
        trains = self.training and self.config.use_gradient_checkpointing
        if trains and self.checkpoints(index, len(blocks)):
            return checkpoint(block, *args, self.ops, cache, use_reentrant=False)
        return block(*args, self.ops, cache)

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
