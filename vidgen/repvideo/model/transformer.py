"""CogVideoX's diffusion transformer (arXiv 2408.06072), optionally with RepVideo's feature cache.

RepVideo (arXiv 2501.08994) has a gate g_i for every layer. With y_1 ... y_n the outputs of the
layers in the current window (text tokens included), layer i reads

    g_i * mean(y_1, ..., y_n) + (1 - g_i) * y_n

instead of y_n; see `vidgen_kernels.feature_cache`. Gates of 0 are plain CogVideoX. Weights and
results do not depend on `ops`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vidgen.ops import EAGER, Ops

from .config import LAYER_NORM_EPS, CogVideoXConfig
from .layers import (
    Block,
    Join,
    Pass,
    PatchEmbedding,
    Stream,
    TimeEmbedding,
    unpatchify,
)
from .positions import Grid, grid_of, rope_positions, sincos_table

INITIAL_GATE = 0.5


class OutputNorm(nn.Module):
    """The norm before the output projection, modulated by the time embedding."""

    def __init__(self, config: CogVideoXConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.time_embed_dim, 2 * config.width)
        self.norm = nn.LayerNorm(config.width, config.out_norm_eps)

    def forward(self, x: Tensor, c: Tensor, ops: Ops) -> Tensor:
        """``x`` and the result ``[B, T, D]``."""
        shift, scale = self.linear(c).chunk(2, dim=-1)
        weight, bias = self.norm.weight, self.norm.bias
        _, a = ops.residual_norm(
            x, scale=scale, shift=shift, weight=weight, bias=bias, eps=self.norm.eps
        )
        return a


class CogVideoXTransformer(nn.Module):
    """Predicts the velocity of noisy latents.

    Attributes:
        learnable_gating: RepVideo's gates ``[layers]``, 0.5 in a fresh model; None without gates.
        gradient_checkpointing: whether training keeps only the input of each layer, one tensor
            ``[B, N, D]``, and runs the layer again in the backward pass.
    """

    def __init__(self, config: CogVideoXConfig | None = None, ops: Ops = EAGER) -> None:
        super().__init__()
        self.config = config = config or CogVideoXConfig()
        self.ops = ops
        self.gradient_checkpointing = False
        self.patch_embed = PatchEmbedding(config)
        self.time_embedding = TimeEmbedding(config.width, config.time_embed_dim)
        self.ofs_embedding = None
        if config.ofs_embed_dim is not None:
            self.ofs_embedding = TimeEmbedding(config.ofs_embed_dim, config.ofs_embed_dim)
        self.transformer_blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm_final = nn.LayerNorm(config.width, LAYER_NORM_EPS)
        self.norm_out = OutputNorm(config)
        n_patch = config.patch_size**2 * (config.patch_size_t or 1)
        self.proj_out = nn.Linear(config.width, n_patch * config.out_channels)
        self.learnable_gating = None
        if config.gates:
            self.learnable_gating = nn.Parameter(torch.full((config.num_layers,), INITIAL_GATE))

    def forward(
        self,
        latents: Tensor,
        text: Tensor,
        timestep: Tensor,
        *,
        ofs: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """The velocity ``[B, T, C, h, w]``.

        Args:
            latents: ``[B, T, C, h, w]``; T, h and w are multiples of the patch size.
            text: T5 features ``[B, S, text_embed_dim]``; padding is attended to like any token.
            timestep: 0 to 999, ``[B]``, integers or not.
            ofs: ``[B]``, for models with ``ofs_embed_dim``.
            positions: coordinates (time, row, column) of the patches ``[N - S, 3]``, fp32 or fp64,
                for models with rotary positions; default `rope_positions`.

        Raises:
            ValueError: shapes that do not fit.
        """
        grid = self._check(latents, text, timestep, ofs, positions)
        c = F.silu(self.embed_time(timestep, ofs, text.dtype))
        table = None
        if not self.config.use_rotary_positional_embeddings:
            table = sincos_table(self.config, grid, latents.device)
        elif positions is None:
            positions = rope_positions(self.config, grid, latents.device)
        shared = Pass(c, text.shape[1], positions)
        stream = self.run(Stream(self.patch_embed(text, latents, table)), shared)
        return self.read_out(stream, shared, grid)

    def embed_time(self, timestep: Tensor, ofs: Tensor | None, dtype: torch.dtype) -> Tensor:
        """``[B, E]``"""
        embedding = self.time_embedding(timestep, dtype)
        if self.ofs_embedding is not None:
            embedding = embedding + self.ofs_embedding(ofs, dtype)
        return embedding

    def run(self, stream: Stream, shared: Pass) -> Stream:
        """All layers."""
        gates = self.gates_like(stream.x)
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._run_checkpointed(stream.x, gates, shared)
        cache = None if gates is None else self.ops.feature_cache(gates, self.config.window)
        for i, block in enumerate(self.transformer_blocks):
            join = self.ops.residual_norm if cache is None else partial(cache.segment, i)
            stream = block(stream, shared, join, self.ops)
        return stream

    def gates_like(self, x: Tensor) -> Tensor | None:
        """The gates ``[layers]``, learned or fixed; None for plain CogVideoX."""
        if self.config.fixed_gate is not None:
            return x.new_full((self.config.num_layers,), self.config.fixed_gate)
        return self.learnable_gating

    def _run_checkpointed(self, y: Tensor, gates: Tensor | None, shared: Pass) -> Stream:
        """`run` with gradient checkpointing.

        Here a layer is a function of the outputs in its window, without a cache that the second run
        in the backward pass would find changed, and adds its update itself.
        """
        outputs: list[Tensor] = []
        for i, block in enumerate(self.transformer_blocks):
            join, older = self.ops.residual_norm, tuple(outputs)
            if gates is not None:
                join = partial(self._join_window, older, gates[i])
                outputs = [*outputs, y]

            def layer(y: Tensor, block: nn.Module = block, join: Join = join) -> Tensor:
                return block(Stream(y), shared, join, self.ops).total(shared.text_length)

            # a layer draws no random numbers
            y = checkpoint(layer, y, use_reentrant=False, preserve_rng_state=False)
            if i % self.config.window == 0:
                outputs = []
        return Stream(y)

    def _join_window(
        self, older: tuple[Tensor, ...], cache_gate: Tensor, y: Tensor, f: None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """A `Join` that mixes the output ``y`` with the ``older`` ones of its window."""
        n = len(older) + 1
        h, a, _, _ = self.ops.segment(
            y, f, None, cache_gate, n, older=older, keep_sum=False, **options
        )
        return h, a

    def read_out(self, stream: Stream, shared: Pass, grid: Grid) -> Tensor:
        """The video tokens to latents."""
        video = slice(shared.text_length, None)
        _, a = self.ops.residual_norm(
            stream.x[:, video],
            None if stream.update is None else stream.update[:, video],
            gate=stream.gate,
            weight=self.norm_final.weight,
            bias=self.norm_final.bias,
            eps=self.norm_final.eps,
        )
        patches = self.proj_out(self.norm_out(a, shared.c, self.ops))
        return unpatchify(patches, grid, self.config.patch_size, self.config.patch_size_t or 1)

    def _check(
        self,
        latents: Tensor,
        text: Tensor,
        timestep: Tensor,
        ofs: Tensor | None,
        positions: Tensor | None,
    ) -> Grid:
        grid = grid_of(self.config, latents)
        n_batch, n_features = len(latents), self.config.text_embed_dim
        if text.ndim != 3 or text.shape[::2] != (n_batch, n_features):
            expected = f"[{n_batch}, S, {n_features}]"
            raise ValueError(f"text: expected shape {expected}, got {list(text.shape)}")
        if timestep.shape != (n_batch,):
            raise ValueError(f"timestep: expected shape [{n_batch}], got {list(timestep.shape)}")
        wants_ofs = self.ofs_embedding is not None
        if (ofs is not None) != wants_ofs or (ofs is not None and ofs.shape != (n_batch,)):
            expected = f"shape [{n_batch}]" if wants_ofs else "None: config has no ofs_embed_dim"
            got = None if ofs is None else list(ofs.shape)
            raise ValueError(f"ofs: expected {expected}, got {got}")
        n_video = grid[0] * grid[1] * grid[2]
        if positions is None:
            return grid
        if not self.config.use_rotary_positional_embeddings:
            raise ValueError("positions: expected None without rotary positions, got a tensor")
        if positions.shape != (n_video, 3):
            raise ValueError(
                f"positions: expected shape {[n_video, 3]}, got {list(positions.shape)}"
            )
        return grid
