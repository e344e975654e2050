"""The packed token sequence: from clips to patches and back, and who sees whom.

A *column* is one training sample or one call of the sampler: text, then clips, oldest first. The
last clip is the one being made. Columns are packed along the tokens,
``[text 0 | video 0 | text 1 | ...]``, so that linear layers and attention run once for all of
them; no column sees another. A batch row holds one sample of each column. Tensors with a row per
sample (text, timesteps) have samples first, then columns: sample b of column i is row
``b * n_columns + i``.

Shapes: B batch rows, S text tokens, L video tokens of a column, C latent channels, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vidgen.ops import IntervalMask, is_traced

from .config import PATCH
from .positions import Column, rotary_positions


@dataclass(frozen=True)
class Packing:
    """The layout of the packed sequence, built once and read by all layers.

    Where a cache holds the text and the oldest frames, the packing describes the other tokens.
    They are all video, and ``past_mask`` says which of the cached keys they see.
    """

    columns: tuple[Column, ...]
    text_length: int
    mask: IntervalMask
    positions: Tensor | None  # [T, axes] of all tokens, for rotary embeddings
    embeddings: Tensor | None = None  # [sum of L, D] of places in the picture, for MM-DiT
    past_mask: IntervalMask | None = None
    only_current: bool = False  # the only queries, also of the masks, are of the clip being made
    last_block: Packing | None = None  # for the last block, where it differs

    @property
    def video_lengths(self) -> list[int]:
        return [n_tokens(column) for column in self.columns]

    @property
    def current_lengths(self) -> list[int]:
        """Tokens of the clips being made."""
        return [n_tokens(column[-1:]) for column in self.columns]

    @property
    def lengths(self) -> list[int]:
        return [self.text_length + n for n in self.video_lengths]

    @property
    def video_positions(self) -> list[Tensor | None]:
        """``[L, axes]`` for each column."""
        if self.positions is None:
            return [None] * len(self.columns)
        return [x[self.text_length :] for x in self.positions.split(self.lengths)]

    def per_block(self, n_blocks: int) -> list[Packing]:
        """The packing for each of the last ``n_blocks`` blocks of a model."""
        packings: list[Packing] = [self] * n_blocks
        if packings and self.last_block is not None:
            packings[-1] = self.last_block
        return packings

    def split_video(self, x: Tensor) -> list[Tensor]:
        """``[B, sum of L, D]`` to ``[B, L, D]`` for each column."""
        return split(x, self.video_lengths)

    def split_heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Attention's ``[B, H, sum of S + L, hd]`` to text ``[B * columns, S, D]`` and video
        ``[B, sum of L, D]``."""
        sizes = [size for n in self.video_lengths for size in (self.text_length, n)]
        parts = x.transpose(1, 2).split(sizes, dim=1)
        text, video = torch.stack(parts[::2], dim=1).flatten(0, 1), torch.cat(parts[1::2], dim=1)
        return text.flatten(2), video.flatten(2)

    def unpack(self, patches: Tensor) -> list[Tensor]:
        """Patches of the clips being made to clips ``[B, C, t, h, w]``, one for each column."""
        parts = patches.split(self.current_lengths, dim=1)
        return [unpatchify(x, column[-1]) for x, column in zip(parts, self.columns, strict=True)]


def split(x: Tensor, lengths: list[int]) -> list[Tensor]:
    """Parts along the tokens. A single part is not split, which would copy in the backward pass."""
    return [x] if len(lengths) == 1 else list(x.split(lengths, dim=1))


def join(parts: list[Tensor]) -> Tensor:
    """Parts one after another along the tokens. A single part is returned as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def n_tokens(column: Column) -> int:
    return sum(frames * rows * cols for frames, rows, cols in column)


def pack(
    columns: tuple[Column, ...],
    text: Tensor,
    text_mask: Tensor | None,
    *,
    causal: bool,
    n_axes: int,
) -> Packing:
    """The packed sequence of ``columns``.

    All tokens see the text, and the text sees the oldest frame. A frame sees the frames up to and
    including itself, or all of them where not ``causal``. Nothing sees the padding of the text.

    Args:
        text: ``[B * columns, S, ...]``; only its size and device matter.
        text_mask: ``[B * columns, S]``, nonzero for text, zero for the padding after it.
        n_axes: of rotary positions: 3 for time, row and column, 1 for time, 0 for none.

    Raises:
        ValueError: a mask of another shape, or (on a CPU) padding before text.
    """
    text_length, device = text.shape[1], text.device
    valid = None if text_mask is None else _valid_lengths(text_mask, text)
    masks = []
    for i, column in enumerate(columns):
        first, *others = _frame_tokens(column)
        blocks = [text_length + first, *others]
        if not causal:
            blocks = [sum(blocks)]
        mask = IntervalMask.block_causal(blocks, device=device)
        if valid is not None:
            mask = IntervalMask.pad_text(mask, text_length, valid[i :: len(columns)])
        masks.append(mask)
    mask = masks[0] if len(masks) == 1 else IntervalMask.pack(masks)
    positions = rotary_positions(columns, text_length, n_axes, device) if n_axes else None
    return Packing(columns, text_length, mask, positions)


def pack_for_sampling(
    column: Column,
    text: Tensor,
    text_mask: Tensor | None,
    *,
    causal: bool,
    n_axes: int,
    past_frames: int = 0,
    only_current: bool = False,
) -> Packing:
    """The sequence of one column without the tokens that a cache holds.

    Args:
        column: all clips, those in the cache included.
        past_frames: how many of the oldest frames are in the cache. If any are, so is the text.
        only_current: in the last block, only tokens of the clip being made are queries.

    Other arguments and errors: as for `pack`, with one column.
    """
    whole = pack((column,), text, text_mask, causal=causal, n_axes=n_axes)
    frames = _frame_tokens(column)
    n_past = whole.text_length + sum(frames[:past_frames]) if past_frames else 0
    n_current = n_tokens(column[-1:])
    rank = torch.arange(len(frames)).repeat_interleave(torch.tensor(frames))
    rank = torch.cat([rank.new_zeros(whole.text_length), rank]).to(text.device)
    rank = rank if causal else torch.zeros_like(rank)
    valid = None if text_mask is None else _valid_lengths(text_mask, text)

    def seen(queries: Tensor, keys: slice) -> IntervalMask:
        """The mask of queries of these ranks, none of which is text."""
        mask = IntervalMask.from_ranks(queries, rank[keys])
        if valid is None or keys.start:
            return mask
        return IntervalMask.pad_text(mask, whole.text_length, valid)

    past, new = slice(0, n_past), slice(n_past, None)
    packing = whole
    if past_frames:
        packing = replace(
            whole,
            columns=(_without_frames(column, past_frames),),
            text_length=0,
            mask=IntervalMask.block_causal(frames[past_frames:], device=text.device),
            positions=None if whole.positions is None else whole.positions[new],
            past_mask=seen(rank[new], past),
        )
    if not only_current:
        return packing
    current = rank[-n_current:]
    last_block = replace(
        packing,
        mask=seen(current, new),
        past_mask=seen(current, past) if past_frames else None,
        only_current=True,
    )
    return replace(packing, last_block=last_block)


def _frame_tokens(column: Column) -> list[int]:
    """Tokens of every frame."""
    return [rows * cols for frames, rows, cols in column for _ in range(frames)]


def _without_frames(column: Column, n_frames: int) -> Column:
    """What is left of the clips without the oldest ``n_frames`` frames."""
    rest = []
    for frames, rows, cols in column:
        dropped = min(frames, n_frames)
        n_frames -= dropped
        if frames > dropped:
            rest.append((frames - dropped, rows, cols))
    return tuple(rest)


def _valid_lengths(text_mask: Tensor, text: Tensor) -> Tensor:
    """Text tokens of each row."""
    if text_mask.shape != text.shape[:2]:
        raise ValueError(
            f"text_mask: expected shape {list(text.shape[:2])}, got {list(text_mask.shape)}"
        )
    is_text = text_mask != 0
    can_look = text_mask.device.type == "cpu" and not is_traced()
    if can_look and (is_text[:, 1:] & ~is_text[:, :-1]).any():
        raise ValueError("text_mask: expected padding after the text, got some before it")
    return is_text.sum(dim=-1)


def grids_of(clips: Sequence[Sequence[Tensor]], n_channels: int) -> tuple[Column, ...]:
    """The sizes of the clips of all columns in tokens.

    Raises:
        ValueError: naming the clip that does not fit.
    """
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


def pack_patches(columns: Sequence[Sequence[Tensor]]) -> Tensor:
    """Patches of the clips of all columns, one after another, ``[B, sum of L, 4 C]``."""
    return torch.cat([patchify(clip) for column in columns for clip in column], dim=1)


def patchify(clip: Tensor) -> Tensor:
    """``[B, C, t, h, w]`` to patches ``[B, t * h/2 * w/2, 4 C]``.

    The channels of a patch are in the order (row, column, latent channel).
    """
    x = clip.unflatten(4, (-1, PATCH)).unflatten(3, (-1, PATCH))  # [B, C, t, h, p, w, q]
    return x.permute(0, 2, 3, 5, 4, 6, 1).flatten(4).flatten(1, 3)


def unpatchify(patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """The inverse of `patchify` for a clip of ``grid`` (frames, rows, columns) patches."""
    x = patches.unflatten(1, grid).unflatten(-1, (PATCH, PATCH, -1))  # [B, t, h, w, p, q, C]
    return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5).flatten(3, 4)
