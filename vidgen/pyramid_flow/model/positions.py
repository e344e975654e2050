"""Positions of tokens: rotary coordinates, and MM-DiT's table of position embeddings.

History enters at lower resolutions than the frame being made. Its tokens get the coordinates of
the area that they cover in that frame's grid of tokens: in a frame of half the size they are 0.5,
2.5, 4.5, ... Time counts frames from the oldest one, at 0. Text is at time 0 as well.

A *grid* is the size (frames, rows, columns) of a clip in tokens. A *column* of a batch is described
by the grids of its clips, oldest first. All its coordinates refer to the last grid, of the clip
being made. `sequence.pack` calls `rotary_positions`, MM-DiT's `PatchEmbedding` the rest.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vidgen.common.tables import kept

Grid = tuple[int, int, int]
Column = tuple[Grid, ...]


def times(column: Column) -> Tensor:
    """The index of every token's frame, counted over all clips, ``[L]``."""
    clips, first = [], 0
    for frames, rows, cols in column:
        clips.append((torch.arange(frames) + first).repeat_interleave(rows * cols))
        first += frames
    return torch.cat(clips).float()


def coordinates(column: Column) -> Tensor:
    """Time, row and column of every token, fp32 ``[L, 3]``."""
    _, n_rows, n_cols = column[-1]
    places = [
        torch.cartesian_prod(interpolated(rows, n_rows), interpolated(cols, n_cols)).repeat(
            frames, 1
        )
        for frames, rows, cols in column
    ]
    return torch.cat([times(column)[:, None], torch.cat(places)], dim=1)


def interpolated(n: int, reference: int) -> Tensor:
    """Coordinates of ``n`` cells in a row that is ``reference`` cells long.

    Cell i is at ``(i + 1/2) reference / n - 1/2``, so that equal numbers give ``0, 1, 2, ...``.
    """
    return ((torch.arange(n) + 0.5) * (reference / n) - 0.5).clamp(0, reference - 1)


@kept
def rotary_positions(
    columns: tuple[Column, ...], text_length: int, n_axes: int, device: torch.device
) -> Tensor:
    """`coordinates` (three axes) or `times` (one) of packed columns, ``[T, n_axes]``.

    Every column begins with ``text_length`` tokens of text. They are at 0 on every axis, which is
    no rotation.
    """
    parts = []
    for column in columns:
        video = coordinates(column) if n_axes == 3 else times(column)[:, None]
        parts += [video.new_zeros(text_length, n_axes), video]
    return torch.cat(parts).to(device)


def sincos_table(width: int, n_side: int, spacing: float) -> Tensor:
    """The 2-D table of sines and cosines, fp32 ``[n_side, n_side, width]``.

    The first half of the channels encodes the column, the second half the row. Each half holds the
    sines, then the cosines, of ``i * spacing * 10000^(-j / (width / 4))`` for index i, channel j.
    """
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angle = torch.arange(n_side, dtype=torch.float64)[:, None] * spacing * frequency
    one_axis = torch.cat([angle.sin(), angle.cos()], dim=-1)  # [n_side, width / 2]
    by_column = one_axis[None].expand(n_side, -1, -1)
    return torch.cat([by_column, by_column.transpose(0, 1)], dim=-1).float()


def crop(table: Tensor, rows: int, cols: int) -> Tensor:
    """The middle ``[rows, cols, D]`` of a table ``[n_side, n_side, D]``.

    Raises:
        ValueError: a grid larger than the table.
    """
    n_side = len(table)
    if max(rows, cols) > n_side:
        raise ValueError(f"grid: expected at most {n_side} tokens a side, got {rows} x {cols}")
    top, left = (n_side - rows) // 2, (n_side - cols) // 2
    return table[top : top + rows, left : left + cols]


def spatial_embedding(
    table: Tensor, grid: tuple[int, int], reference: tuple[int, int], interpolate: bool = True
) -> Tensor:
    """Embeddings ``[rows * cols, D]`` for a frame of ``grid`` tokens.

    The table is cropped to the ``reference`` grid and resized to ``grid``. Without ``interpolate``
    it is cropped to ``grid`` at once.
    """
    if grid == reference or not interpolate:
        return crop(table, *grid).flatten(0, 1)
    image = crop(table, *reference).permute(2, 0, 1)[None]
    resized = F.interpolate(image, size=grid, mode="bilinear", align_corners=False)
    return resized[0].flatten(1).T
