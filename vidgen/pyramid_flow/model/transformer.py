"""What Pyramid Flow's two transformers share: how they are called, packed and initialised.

There are two ways to call a model:

    predict    from clips, timesteps and text features to velocities; training calls this
    forward    on prepared inputs: packed patches, embedded text, `condition` and `packing`; the
               sampler calls this at every step, with inputs that it prepares once for many steps

A velocity is noise minus data, as in `training.loss`. Weights and results do not depend on ``ops``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vidgen.ops import EAGER, Ops

from .config import PATCH, FluxConfig, MMDiTConfig
from .kv_cache import BlockCache
from .layers import AdaLNContinuous, AdaLNZero, Condition, Stream, TimeTextEmbedding
from .positions import Column
from .sequence import Packing, grids_of, pack, pack_for_sampling, pack_patches


class PyramidTransformer(nn.Module):
    """The common part. A model adds `forward`, its blocks and the embedding of patches."""

    def __init__(
        self, config: FluxConfig | MMDiTConfig, axes: tuple[int, ...], ops: Ops = EAGER
    ) -> None:
        """``axes``: how many channels of a head are rotated by each axis of its position."""
        super().__init__()
        self.config, self.axes, self.ops = config, axes, ops
        self.time_text_embed = TimeTextEmbedding(config.pooled_projection_dim, config.width)
        self.context_embedder = nn.Linear(config.joint_attention_dim, config.width)
        self.norm_out = AdaLNContinuous(config.width)
        self.proj_out = nn.Linear(config.width, PATCH * PATCH * config.latent_channels)

    def predict(
        self,
        columns: Sequence[Sequence[Tensor]],
        timestep: Tensor,
        text: Tensor,
        text_mask: Tensor | None,
        pooled: Tensor,
        *,
        causal: bool | None = None,
    ) -> list[Tensor]:
        """Velocities of the last clip of every column, ``[B, C, t, h, w]``.

        Rows of the other inputs have samples first, then columns (see `sequence`).

        Args:
            columns: for each column its clips ``[B, C, t, h, w]``, oldest first; h and w even.
            timestep: 0 to 1000, ``[B * columns]``.
            text: T5 features ``[B * columns, S, joint_attention_dim]``.
            text_mask: ``[B * columns, S]``, zero for the padding at the end; None: no padding.
            pooled: CLIP features ``[B * columns, pooled_projection_dim]``.
            causal: whether frames see only the frames before them; default as the config says.

        Raises:
            ValueError: shapes that do not fit, padding before text.
        """
        packing = self.pack(columns, text, text_mask, causal=causal)
        n_rows, n_columns = len(columns[0][0]), len(columns)
        for name, x in (("text", text), ("pooled", pooled), ("timestep", timestep)):
            if len(x) != n_rows * n_columns:
                raise ValueError(
                    f"{name}: expected {n_rows * n_columns} rows ({n_rows} samples x "
                    f"{n_columns} columns), got shape {list(x.shape)}"
                )
        text_tokens, pooled = self.embed_text(text, pooled)
        condition = self.condition(timestep, pooled)
        return packing.unpack(self(pack_patches(columns), text_tokens, condition, packing))

    def forward(
        self,
        patches: Tensor,
        text_tokens: Tensor,
        condition: Condition,
        packing: Packing,
        caches: Sequence[BlockCache] | None = None,
    ) -> Tensor:
        """Velocities of the last clips in patches, ``[B, sum over columns, 4 C]``.

        Args:
            patches: of all clips (`pack_patches`) that no cache holds, ``[B, sum of L, 4 C]``.
            text_tokens: from `embed_text`, ``[B * columns, S, D]``; not read where the caches hold
                the text.
            condition: from `condition`.
            packing: from `pack`, or with caches from `pack_for_sampling`.
            caches: the keys and values of each block.
        """
        raise NotImplementedError

    def embed_text(self, text: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """T5 and CLIP features as `predict` takes them to text tokens ``[B * columns, S, D]`` and
        pooled text ``[B * columns, D]``. They serve all timesteps."""
        return self.context_embedder(text), self.time_text_embed.text_embedder(pooled)

    def condition(self, timestep: Tensor, pooled: Tensor, *, keep: bool = False) -> Condition:
        """The condition of timesteps ``[B * columns]`` and the pooled text of `embed_text`.

        With ``keep`` it stores the modulation of every layer, for more calls at these timesteps.
        """
        c = F.silu(self.time_text_embed(timestep, pooled))
        return Condition(c, {} if keep else None)

    def pack(
        self,
        columns: Sequence[Sequence[Tensor]],
        text: Tensor,
        text_mask: Tensor | None,
        *,
        causal: bool | None = None,
    ) -> Packing:
        """Mask and positions for a call; arguments and errors as for `predict`."""
        grids = grids_of(columns, self.config.latent_channels)
        causal = self.config.use_temporal_causal if causal is None else causal
        packing = pack(grids, text, text_mask, causal=causal, n_axes=len(self.axes))
        return replace(packing, embeddings=self.place_embeddings(grids))

    def pack_for_sampling(
        self,
        column: Column,
        text: Tensor,
        text_mask: Tensor | None,
        *,
        past_frames: int = 0,
        only_current: bool = False,
    ) -> Packing:
        """Mask and positions of one column, part of which may be in a cache.

        Args:
            column: the sizes (frames, rows, columns) of all its clips in tokens, oldest first.
            text: ``[B, S, ...]``; only its size and device matter.
            past_frames: how many of the oldest frames are in the caches; `forward` is not given
                their patches.
            only_current: the last block runs only on the tokens of the clip being made. The
                result is the same, for less work.
        """
        packing = pack_for_sampling(
            column,
            text,
            text_mask,
            causal=self.config.use_temporal_causal,
            n_axes=len(self.axes),
            past_frames=past_frames,
            only_current=only_current,
        )
        return replace(packing, embeddings=self.place_embeddings(packing.columns))

    def place_embeddings(self, columns: tuple[Column, ...]) -> Tensor | None:
        """What is added to tokens for their place in the picture; None: nothing."""
        return None

    @property
    def n_blocks(self) -> int:
        """Blocks of all kinds."""
        config = self.config
        return config.num_layers + getattr(config, "num_single_layers", 0)

    def norm_and_project(self, stream: Stream, condition: Condition, packing: Packing) -> Tensor:
        """The way out of a model: from the tokens of the last clips to patches of velocity."""
        (modulation,) = self.norm_out(condition, len(packing.columns))
        _, a = stream.last(packing.current_lengths).norm(modulation, self.ops)
        return self.proj_out(a)

    def checkpointed(self, blocks: nn.ModuleList) -> list[Callable[..., Any]]:
        """The blocks; in training, some of them keep only their inputs for the backward pass."""
        if not (self.training and self.config.use_gradient_checkpointing):
            return list(blocks)
        return [
            partial(checkpoint, block, use_reentrant=False)
            if self.is_checkpointed(i, len(blocks))
            else block
            for i, block in enumerate(blocks)
        ]

    def is_checkpointed(self, index: int, n_blocks: int) -> bool:
        """Whether the block of this index, of ``n_blocks`` of its kind, keeps only its inputs."""
        raise NotImplementedError

    def initialize(self) -> None:
        """As the official models start: their output is 0."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        for two in (self.time_text_embed.timestep_embedder, self.time_text_embed.text_embedder):
            nn.init.normal_(two.linear_1.weight, std=0.02)
            nn.init.normal_(two.linear_2.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, AdaLNZero):
                nn.init.zeros_(module.linear.weight)
        nn.init.zeros_(self.proj_out.weight)
