"""Where tokens are: in time, and in the pyramid of resolutions.

History enters at lower resolutions than the frame that is being made. Its tokens get the places
that they cover in that frame's grid of tokens, so a token of a frame of half the size lies between
two of the full size: coordinates 0.5, 2.5, 4.5, ... Time counts the frames from the oldest, text
is at time 0.

A *grid* is the size (frames, rows, columns) of a clip in tokens, a *column* of a batch the grids of
its clips, oldest first; the last is the one being made, the reference of all coordinates.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int, int]
Column = tuple[Grid, ...]


def times(column: Column) -> Tensor:
    """The number of its frame for every token, counted over all clips, ``[L]``."""
    clips, first = [], 0
    for frames, rows, cols in column:
        clips.append((torch.arange(frames) + first).repeat_interleave(rows * cols))
        first += frames
    return torch.cat(clips).float()


def coordinates(column: Column) -> Tensor:
    """Time, row and column of every token for rotary embeddings, fp32 ``[L, 3]``."""
    _, n_rows, n_cols = column[-1]
    places = [
        torch.cartesian_prod(interpolated(rows, n_rows), interpolated(cols, n_cols)).repeat(
            frames, 1
        )
        for frames, rows, cols in column
    ]
    return torch.cat([times(column)[:, None], torch.cat(places)], dim=1)


def interpolated(n: int, reference: int) -> Tensor:
    """Centres of ``n`` equal cells in units of ``reference`` cells, counted from the first one's.

    ``0, 1, 2, ...`` for equal numbers.
    """
    return ((torch.arange(n) + 0.5) * (reference / n) - 0.5).clamp(0, reference - 1)


def rotary_positions(
    columns: tuple[Column, ...], text_length: int, n_axes: int, device: torch.device
) -> Tensor:
    """`coordinates` (three axes) or `times` (one) of columns one after another, ``[T, n_axes]``.

    Every column begins with ``text_length`` tokens of text, at 0 on every axis: not rotated.
    """
    parts = []
    for column in columns:
        video = coordinates(column) if n_axes == 3 else times(column)[:, None]
        parts += [video.new_zeros(text_length, n_axes), video]
    return torch.cat(parts).to(device)


# Layouts are few and come back at every step, so their positions stay on the device.
@functools.lru_cache(maxsize=64)
def kept_rotary_positions(
    columns: tuple[Column, ...], text_length: int, n_axes: int, device: torch.device
) -> Tensor:
    """`rotary_positions`, made once for a layout."""
    with torch.inference_mode(False):  # what is kept must serve training too
        return rotary_positions(columns, text_length, n_axes, device)


def sincos_table(width: int, n_side: int, spacing: float) -> Tensor:
    """The 2-D table of sines and cosines, fp32 ``[n_side, n_side, width]``.

    The first half of the channels tells the column, the second the row, each as sines then cosines
    of ``i * spacing * 10000^(-j / (width / 4))``.
    """
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angle = torch.arange(n_side, dtype=torch.float64)[:, None] * spacing * frequency
    one_axis = torch.cat([angle.sin(), angle.cos()], dim=-1)  # [n_side, width / 2]
    by_column = one_axis[None].expand(n_side, -1, -1)
    return torch.cat([by_column, by_column.transpose(0, 1)], dim=-1).float()


def crop(table: Tensor, rows: int, cols: int) -> Tensor:
    """The middle of a table ``[n_side, n_side, D]``, ``[rows, cols, D]``."""
    n_side = len(table)
    if max(rows, cols) > n_side:
        raise ValueError(f"grid: expected at most {n_side} tokens a side, got {rows} x {cols}")
    top, left = (n_side - rows) // 2, (n_side - cols) // 2
    return table[top : top + rows, left : left + cols]


def spatial_embedding(
    table: Tensor, grid: tuple[int, int], reference: tuple[int, int], interpolate: bool = True
) -> Tensor:
    """Embeddings ``[rows * cols, D]`` of a frame of ``grid`` tokens.

    The crop of the table for the ``reference`` grid, resized; without ``interpolate``, or where
    the grids are equal, a crop of the frame's own size.
    """
    if grid == reference or not interpolate:
        return crop(table, *grid).flatten(0, 1)
    image = crop(table, *reference).permute(2, 0, 1)[None]
    resized = F.interpolate(image, size=grid, mode="bilinear", align_corners=False)
    return resized[0].flatten(1).T
