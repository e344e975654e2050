"""The spatial part: what each token of a frame should become, from those that are there already.

As a masked autoencoder: the first half of the layers sees the frame's condition and the visible
tokens, the second half the condition and all tokens, where the rest is the mask token at its place.
All see all in both. Only what is read of the last layer need be computed (`rows`).

`set_causal.py` holds the other way to run the same weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vidgen.ops import EAGER, IntervalMask, Ops

from .config import NovaConfig
from .embeddings import PatchEmbed, rotary_positions, space_table
from .vit import Pass, Rows, VisionTransformer, take


class ImageEncoder(VisionTransformer):
    def __init__(self, config: NovaConfig, ops: Ops = EAGER) -> None:
        super().__init__(config.arch.image_encoder, ops)
        self.encoder, self.grid = config.arch.image_encoder, config.image_grid
        self.is_rotary = config.rotary_pos_embed
        self.patch_embed = PatchEmbed(config.image_dim, config.width, config.patch)

    @property
    def first_half(self) -> range:
        return range(self.encoder.encoder_depth)

    @property
    def second_half(self) -> range:
        return range(self.encoder.encoder_depth, self.encoder.depth)

    def place(self, tokens: Tensor) -> Tensor:
        """All tokens of a frame [B, N, D] with their places added, unless those are rotary."""
        if self.is_rotary:
            return tokens
        table = space_table(tokens.shape[-1], self.grid, tokens.device, tokens.dtype)
        return tokens + table

    def positions(self, like: Tensor, ids: Tensor | None = None) -> Tensor | None:
        """Rotary positions of all tokens ``[N, 3]`` or of ``ids`` ``[B, n, 3]``; None without."""
        if not self.is_rotary:
            return None
        dtype = torch.promote_types(like.dtype, torch.float32)
        positions = rotary_positions(range(1), self.grid, like.device, dtype)
        return positions if ids is None else positions[ids.clamp(max=len(positions) - 1)]

    def forward(
        self, tokens: Tensor, condition: Tensor, ids: Tensor, *, rows: Tensor | None = None
    ) -> Tensor:
        """Features ``[B, N, D]``, or of the tokens ``rows`` [B, n] alone.

        Args:
            tokens: ``[B, N, D]``, the mask token where nothing is visible; not placed yet.
            condition: of the frame, ``[B, Nv, D]``.
            ids: of the visible tokens, ``[B, V]``.
        """
        canvas = self.place(tokens)
        encoded = self.encode(take(canvas, ids), condition, ids)
        return self.decode(encoded, canvas, ids, rows=rows)

    def encode(
        self, visible: Tensor, condition: Tensor, ids: Tensor, *, mask: IntervalMask | None = None
    ) -> Tensor:
        """The first half: ``[B, Nv + V, D]``, condition first.

        Args:
            visible: placed tokens ``[B, V, D]``, in any order.
            ids: which they are, ``[B, V]``; N for padding, whose keys ``mask`` must hide.
        """
        h = torch.cat([condition, visible], dim=1)
        shared = Pass(mask, self.positions(h, ids), condition.shape[1])
        return self.run(h, self.first_half, shared)

    def decode(
        self, encoded: Tensor, canvas: Tensor, ids: Tensor, *, rows: Tensor | None = None
    ) -> Tensor:
        """The second half and the last norm: ``[B, N, D]``, or of ``rows`` [B, n] alone.

        Args:
            encoded: `encode`'s ``[B, Nv + V, D]``; padding, of id N, is left out.
            canvas: placed tokens ``[B or 1, N, D]``; visible ones may hold anything.
        """
        n_condition = encoded.shape[1] - ids.shape[1]
        h = self.decoder_input(encoded, canvas, ids)
        wanted: Rows = slice(n_condition, None) if rows is None else n_condition + rows
        shared = Pass(None, self.positions(h), n_condition)
        return self.norm(self.run(h, self.second_half, shared, wanted))

    def decoder_input(self, encoded: Tensor, canvas: Tensor, ids: Tensor) -> Tensor:
        """``[condition | all tokens]``, the encoded ones put back in their places."""
        n_rows, n_visible = ids.shape
        n_condition, n_tokens = encoded.shape[1] - n_visible, canvas.shape[1]
        # one row more than there are tokens, for padding
        h = canvas.new_empty(n_rows, n_condition + n_tokens + 1, canvas.shape[-1])
        h[:, :n_condition] = encoded[:, :n_condition]
        h[:, n_condition:-1] = canvas
        index = (n_condition + ids)[:, :, None].expand(-1, -1, h.shape[-1])
        return h.scatter(1, index, encoded[:, n_condition:])[:, :-1]
