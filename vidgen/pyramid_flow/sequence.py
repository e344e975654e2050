"""From clips to tokens and back: patches, the packed sequence, its mask.

A *column* is one training sample or inference call: text, then the clips oldest first, the last of
which is being made. Columns are packed along the tokens, ``[text 0 | video 0 | text 1 | ...]``, for
the linear layers and one call of attention; none sees another. A batch row holds one sample of
each column. What comes per sample (text, timesteps) has samples first, then columns: sample b of
column i is row ``b * n_columns + i``.

Shapes: B batch rows, S text tokens, L video tokens of a column, C latent channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vidgen.ops import IntervalMask

from .config import PATCH
from .positions import Column, kept_rotary_positions, rotary_positions


@dataclass(frozen=True)
class Packing:
    """What the layers need to know of the sequence, built once and shared by all of them."""

    columns: tuple[Column, ...]
    n_rows: int  # B
    text_length: int
    mask: IntervalMask
    positions: Tensor | None  # [T, axes] of all tokens, for rotary embeddings

    @property
    def video_lengths(self) -> list[int]:
        return [n_tokens(column) for column in self.columns]

    @property
    def current_lengths(self) -> list[int]:
        """Tokens of the clips that are being made."""
        return [n_tokens(column[-1:]) for column in self.columns]

    @property
    def lengths(self) -> list[int]:
        return [self.text_length + n for n in self.video_lengths]

    @property
    def video_positions(self) -> list[Tensor | None]:
        """``[L, axes]`` per column."""
        if self.positions is None:
            return [None] * len(self.columns)
        return [x[self.text_length :] for x in self.positions.split(self.lengths)]

    def check(self, **per_sample: Tensor) -> None:
        """ValueError unless these have a row per sample and column."""
        n_samples = self.n_rows * len(self.columns)
        for name, x in per_sample.items():
            if len(x) != n_samples:
                raise ValueError(
                    f"{name}: expected {n_samples} rows ({self.n_rows} samples x "
                    f"{len(self.columns)} columns), got shape {list(x.shape)}"
                )

    def split_video(self, x: Tensor) -> list[Tensor]:
        """``[B, sum of L, D]`` to ``[B, L, D]`` per column."""
        return split(x, self.video_lengths)

    def split_heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Attention's ``[B, H, sum of S + L, hd]`` to text ``[B * columns, S, D]`` and video
        ``[B, sum of L, D]``."""
        sizes = [size for n in self.video_lengths for size in (self.text_length, n)]
        parts = x.transpose(1, 2).split(sizes, dim=1)
        text, video = torch.stack(parts[::2], dim=1).flatten(0, 1), torch.cat(parts[1::2], dim=1)
        return text.flatten(2), video.flatten(2)


def split(x: Tensor, lengths: list[int]) -> list[Tensor]:
    """Parts along the tokens; a single one as it is, for the gradient of a split is a copy."""
    return [x] if len(lengths) == 1 else list(x.split(lengths, dim=1))


def n_tokens(column: Column) -> int:
    return sum(frames * rows * cols for frames, rows, cols in column)


def pack(
    columns: tuple[Column, ...],
    n_rows: int,
    text: Tensor,
    text_mask: Tensor | None,
    causal: bool,
    n_axes: int,
) -> Packing:
    """The packed sequence of ``columns``.

    Text is seen by all and sees the oldest frame; a frame sees the text and the frames up to
    itself, or all of them where not ``causal``. Padding of the text is seen by nobody.

    Args:
        text: ``[B * columns, S, ...]``; only its size and device matter.
        text_mask: ``[B * columns, S]``, nonzero for text, zero for the padding after it.
        n_axes: of rotary positions: 3 for time, row and column, 1 for time, 0 for none.

    Raises:
        ValueError: another shape of the mask, or (on a CPU) padding before text.
    """
    text_length, device = text.shape[1], text.device
    valid = None if text_mask is None else _valid_lengths(text_mask, text)
    masks = []
    for i, column in enumerate(columns):
        first, *others = [rows * cols for frames, rows, cols in column for _ in range(frames)]
        blocks = [text_length + first, *others]
        if not causal:
            blocks = [sum(blocks)]
        mask = IntervalMask.block_causal(blocks, device=device)
        if valid is not None:
            mask = IntervalMask.pad_text(mask, text_length, valid[i :: len(columns)])
        masks.append(mask)
    mask = masks[0] if len(masks) == 1 else IntervalMask.pack(masks)
    make = rotary_positions if torch.compiler.is_compiling() else kept_rotary_positions
    positions = make(columns, text_length, n_axes, device) if n_axes else None
    return Packing(columns, n_rows, text_length, mask, positions)


def _valid_lengths(text_mask: Tensor, text: Tensor) -> Tensor:
    """Text tokens per row."""
    if text_mask.shape != text.shape[:2]:
        raise ValueError(
            f"text_mask: expected shape {list(text.shape[:2])}, got {list(text_mask.shape)}"
        )
    is_text = text_mask != 0
    can_look = text_mask.device.type == "cpu" and not torch.compiler.is_compiling()
    if can_look and (is_text[:, 1:] & ~is_text[:, :-1]).any():
        raise ValueError("text_mask: expected padding after the text, got some before it")
    return is_text.sum(dim=-1)


def grids_of(clips: Sequence[Sequence[Tensor]], n_channels: int) -> tuple[Column, ...]:
    """The sizes of the clips in tokens, or a ValueError that names what does not fit."""
    if not clips or not all(clips):
        raise ValueError(f"columns: expected clips in every one, got {[len(c) for c in clips]}")
    n_rows = len(clips[0][0])
    for i, column in enumerate(clips):
        for clip in column:
            shape = clip.shape
            if clip.ndim != 5 or shape[:2] != (n_rows, n_channels):
                expected = f"[{n_rows}, {n_channels}, frames, height, width]"
                raise ValueError(f"column {i}: expected clips {expected}, got {list(shape)}")
            if shape[2] == 0 or shape[3] % PATCH or shape[4] % PATCH or 0 in shape[3:]:
                raise ValueError(
                    f"column {i}: expected frames whose sides are multiples of {PATCH}, "
                    f"got {list(shape[2:])}"
                )
    return tuple(
        tuple((c.shape[2], c.shape[3] // PATCH, c.shape[4] // PATCH) for c in column)
        for column in clips
    )


def patchify(clip: Tensor) -> Tensor:
    """``[B, C, t, h, w]`` to tokens ``[B, t * h/2 * w/2, 4 C]``: row, column in the patch, C."""
    x = clip.unflatten(4, (-1, PATCH)).unflatten(3, (-1, PATCH))  # [B, C, t, h, p, w, q]
    return x.permute(0, 2, 3, 5, 4, 6, 1).flatten(4).flatten(1, 3)


def unpatchify(tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """The inverse of `patchify` for a clip of ``grid`` (frames, rows, columns) tokens."""
    x = tokens.unflatten(1, grid).unflatten(-1, (PATCH, PATCH, -1))  # [B, t, h, w, p, q, C]
    return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5).flatten(3, 4)
