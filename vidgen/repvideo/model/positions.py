"""Positions of video tokens: a sine-cosine table that is added, or coordinates for rotation.

Tokens are T x H x W patches in the order frame, row, column. Text has no position.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import CogVideoXConfig

Grid = tuple[int, int, int]  # T, H, W


def grid_of(config: CogVideoXConfig, latents: Tensor) -> Grid:
    """The grid of patches of latents ``[B, T, C, h, w]``. Raises ValueError for other shapes."""
    expected = f"[B, T, {config.in_channels}, h, w]"
    if latents.ndim != 5 or latents.shape[2] != config.in_channels:
        raise ValueError(f"latents: expected shape {expected}, got {list(latents.shape)}")
    frames, _, height, width = latents.shape[1:]
    patch, patch_t = config.patch_size, config.patch_size_t or 1
    if frames % patch_t or height % patch or width % patch or 0 in latents.shape:
        raise ValueError(
            f"latents: expected T, h, w to be multiples of {patch_t}, {patch}, {patch}, "
            f"got {[frames, height, width]}"
        )
    return frames // patch_t, height // patch, width // patch


def sincos_table(config: CogVideoXConfig, grid: Grid, device: torch.device) -> Tensor:
    """The position embeddings that are added to the video tokens, ``[T H W, D]``, fp32.

    Channels: time (D / 4), column (3 D / 8), row (3 D / 8). Positions start at 0 and are divided by
    the interpolation scales.
    """
    frames, rows, cols = grid
    scales = config.temporal_interpolation_scale, config.spatial_interpolation_scale
    time = _sincos(frames, config.width // 4, scales[0], device)
    col = _sincos(cols, config.width // 8 * 3, scales[1], device)
    row = _sincos(rows, config.width // 8 * 3, scales[1], device)
    parts = time[:, None, None], col[None, None], row[None, :, None]
    return torch.cat([x.expand(*grid, -1) for x in parts], dim=-1).flatten(0, 2)


def _sincos(n: int, width: int, scale: float, device: torch.device) -> Tensor:
    """``[n, width]``: sines, then cosines of position times 10000^(-2 k / width)."""
    k = torch.arange(width // 2, dtype=torch.float64, device=device)
    # the released code divides in fp32
    position = (torch.arange(n, dtype=torch.float32, device=device) / scale).double()
    angle = position[:, None] * 10000.0 ** (-2 * k / width)
    return torch.cat([angle.sin(), angle.cos()], dim=-1).float()


def rope_positions(config: CogVideoXConfig, grid: Grid, device: torch.device) -> Tensor:
    """Coordinates (time, row, column) of the video tokens, ``[T H W, 3]``, fp32.

    In CogVideoX 1.5 they are the indices. Before that, as in diffusers, a frame of another size
    than the trained one is scaled to fit into the trained grid, and centred in it.
    """
    frames, rows, cols = grid
    time = torch.arange(frames, dtype=torch.float32, device=device)
    if config.patch_size_t is not None:
        row = torch.arange(rows, dtype=torch.float32, device=device)
        col = torch.arange(cols, dtype=torch.float32, device=device)
    else:
        patch = config.patch_size
        base_rows, base_cols = config.sample_height // patch, config.sample_width // patch
        if rows / cols > base_rows / base_cols:
            height, width = base_rows, round(base_rows / rows * cols)
        else:
            height, width = round(base_cols / cols * rows), base_cols
        row = _spread(rows, round((base_rows - height) / 2), height, device)
        col = _spread(cols, round((base_cols - width) / 2), width, device)
    return torch.stack(torch.meshgrid(time, row, col, indexing="ij"), dim=-1).flatten(0, 2)


def _spread(n: int, start: int, length: int, device: torch.device) -> Tensor:
    """n coordinates from ``start`` to ``(start + length) (n - 1) / n``, as diffusers has them."""
    end = (start + length) * (n - 1) / n
    return torch.linspace(start, end, n, dtype=torch.float32, device=device)
