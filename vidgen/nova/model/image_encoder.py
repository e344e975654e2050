"""The image encoder: features z of the tokens of a frame, from the tokens that are visible already.

It works as a masked autoencoder. The first half of the layers runs on the frame's condition (the
features of the video encoder) and the visible tokens. The second half runs on the condition and all
tokens: visible ones as the first half left them, the others as mask token + position. Attention is
full in both halves. In the last layer only the wanted rows are computed (``rows``).

`set_causal.py` runs the same weights under another rule.
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
        """All tokens of a frame [B, N, D] plus position embeddings, unless positions are rotary."""
        if self.is_rotary:
            return tokens
        table = space_table(tokens.shape[-1], self.grid, tokens.device, tokens.dtype)
        return tokens + table

    def positions(self, like: Tensor, ids: Tensor | None = None) -> Tensor | None:
        """Rotary positions of all tokens ``[N, 3]``, or of ``ids``, ``[B, n, 3]``.

        None where positions are added to the tokens.
        """
        if not self.is_rotary:
            return None
        dtype = torch.promote_types(like.dtype, torch.float32)
        positions = rotary_positions(range(1), self.grid, like.device, dtype)
        return positions if ids is None else positions[ids.clamp(max=len(positions) - 1)]

    def forward(
        self, tokens: Tensor, condition: Tensor, ids: Tensor, *, rows: Tensor | None = None
    ) -> Tensor:
        """Features ``[B, N, D]`` of all tokens, or ``[B, n, D]`` of the tokens ``rows`` [B, n].

        Args:
            tokens: ``[B, N, D]`` without positions; masked ones are the mask token.
            condition: of the frame, ``[B, Nv, D]``.
            ids: indices of the visible tokens, ``[B, V]``.
        """
        canvas = self.place(tokens)
        encoded = self.encode(take(canvas, ids), condition, ids)
        return self.decode(encoded, canvas, ids, rows=rows)

    def encode(
        self, visible: Tensor, condition: Tensor, ids: Tensor, *, mask: IntervalMask | None = None
    ) -> Tensor:
        """The first half: ``[B, Nv + V, D]``, condition first.

        Args:
            visible: tokens of `place`, ``[B, V, D]``, in any order.
            ids: their indices in the frame, ``[B, V]``; N for padding, which ``mask`` must hide.
        """
        h = torch.cat([condition, visible], dim=1)
        shared = Pass(mask, self.positions(h, ids), condition.shape[1])
        return self.run(h, self.first_half, shared)

    def decode(
        self, encoded: Tensor, canvas: Tensor, ids: Tensor, *, rows: Tensor | None = None
    ) -> Tensor:
        """The second half and the last norm: ``[B, N, D]``, or ``[B, n, D]`` for ``rows`` [B, n].

        Args:
            encoded: the result of `encode`, ``[B, Nv + V, D]``.
            canvas: tokens of `place`, ``[B or 1, N, D]``; visible ones are overwritten.
            ids: as in `encode`; padding is dropped.
        """
        n_condition = encoded.shape[1] - ids.shape[1]
        h = self.decoder_input(encoded, canvas, ids)
        wanted: Rows = slice(n_condition, None) if rows is None else n_condition + rows
        shared = Pass(None, self.positions(h), n_condition)
        return self.norm(self.run(h, self.second_half, shared, wanted))

    def decoder_input(self, encoded: Tensor, canvas: Tensor, ids: Tensor) -> Tensor:
        """``[condition | all tokens]``, with the encoded tokens at their places in the frame."""
        n_rows, n_visible = ids.shape
        n_condition, n_tokens = encoded.shape[1] - n_visible, canvas.shape[1]
        # padding is written to an additional row, which is cut off
        h = canvas.new_empty(n_rows, n_condition + n_tokens + 1, canvas.shape[-1])
        h[:, :n_condition] = encoded[:, :n_condition]
        h[:, n_condition:-1] = canvas
        index = (n_condition + ids)[:, :, None].expand(-1, -1, h.shape[-1])
        return h.scatter(1, index, encoded[:, n_condition:])[:, :-1]
