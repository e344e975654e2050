"""Embeddings of NOVA: patches, positions, text, class, motion and special tokens.

Shapes: B batch rows, T frames, C latent channels, D width, N tokens of a frame.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidgen.common.tables import kept

N_FREQUENCIES = 128  # in the embeddings of times, motion and timesteps
N_TEXT_ROWS = 512  # rows of the table that texts are filled up from
N_CLASSES = 1000  # the label N_CLASSES means no class
DEFAULT_FLOW, DEFAULT_FPS = 5.0, 12.0
INIT_STD = 0.02


def frequencies(n: int, device: torch.device | str = "cpu") -> Tensor:
    """``10000^(-i / n)``, fp32 ``[n]``."""
    return 1 / 10000 ** (torch.arange(n, dtype=torch.float32, device=device) / n)


def sincos(x: Tensor) -> Tensor:
    """Sines, then cosines of ``[...]`` values, fp32 ``[..., 256]``."""
    angle = x.float()[..., None] * frequencies(N_FREQUENCIES, x.device)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


@kept
def space_table(
    width: int, grid: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Position embeddings ``[rows * columns, D]``: sines and cosines of column, then of row."""
    angle = grid_positions(grid, device)[..., None] * frequencies(width // 4, device)
    row, col = angle.unbind(1)  # [N, D / 4]
    return torch.cat([col.sin(), col.cos(), row.sin(), row.cos()], dim=-1).to(dtype)


def grid_positions(grid: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
    """Row and column of every token, fp32 ``[N, 2]``."""
    rows, cols = (torch.arange(n, dtype=torch.float32, device=device) for n in grid)
    return torch.cartesian_prod(rows, cols)


@kept
def rotary_positions(
    frames: range, grid: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Frame, row and column of every token, ``[T * N, 3]``."""
    place = grid_positions(grid, device).repeat(len(frames), 1)
    time = torch.tensor([*frames], dtype=torch.float32, device=device)
    time = time.repeat_interleave(grid[0] * grid[1])
    return torch.cat([time[:, None], place], dim=1).to(dtype)


def patchify(x: Tensor, patch: int) -> Tensor:
    """Latents ``[B, C, h, w]`` to tokens ``[B, N, p * p * C]``, order: row, column, channel."""
    x = x.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # [B, C, rows, p, cols, p]
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3, 5).flatten(1, 2)


def unpatchify(tokens: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`."""
    x = tokens.unflatten(2, (patch, patch, -1)).unflatten(1, grid)  # [B, rows, cols, p, p, C]
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class PatchEmbed(nn.Module):
    def __init__(self, n_channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(n_channels, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, h, w]`` to ``[B, N, D]``."""
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()

    def of_tokens(self, tokens: Tensor) -> Tensor:
        """The same for tokens of `patchify`, ``[..., p * p * C]`` to ``[..., D]``."""
        return F.linear(tokens, self.token_weight, self.proj.bias)

    @property
    def token_weight(self) -> Tensor:
        """The convolution as a matrix ``[D, p * p * C]``, columns in the order of `patchify`."""
        return self.proj.weight.permute(0, 2, 3, 1).flatten(1)


class SinusoidMLP(nn.Sequential):
    """Embeds a number: sines and cosines, then two layers."""

    def __init__(self, width: int) -> None:
        first, last = nn.Linear(2 * N_FREQUENCIES, width), nn.Linear(width, width)
        super().__init__(first, nn.SiLU(), last)

    @property
    def weight(self) -> Tensor:
        """The weight of the first layer, which tells device and dtype."""
        return next(self.parameters())

    def forward(self, x: Tensor) -> Tensor:
        """``[...]`` to ``[..., D]``."""
        return super().forward(sincos(x).to(self.weight))


class VideoPosEmbed(nn.Module):
    """Position embeddings of the video encoder: of frames in time, and of tokens in a frame."""

    def __init__(self, width: int, base_size: tuple[int, int, int]) -> None:
        super().__init__()
        self.width, (self.n_base_frames, *grid) = width, base_size
        self.grid = grid[0], grid[1]
        self.time_proj = SinusoidMLP(width)
        self.norm = nn.LayerNorm(width)

    def times(self, n_frames: int) -> Tensor:
        """Times of the frames of a clip, fp32 ``[T]``: ``t Tb / T``, from 0 to below Tb."""
        frame = torch.arange(n_frames, dtype=torch.float32, device=self.norm.weight.device)
        return frame / (n_frames / self.n_base_frames)

    def time_embedding(self, n_frames: int) -> Tensor:
        """``[T, 1, D]``."""
        return self.norm(self.time_proj(self.times(n_frames)))[:, None]

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """``x`` [B, T, N, D] plus its position embeddings; ``time`` [T, 1, D]."""
        return x + time + space_table(self.width, self.grid, x.device, x.dtype)


class MotionEmbed(nn.Module):
    """Amount of motion and frames per second, as two tokens of the condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.flow_proj, self.fps_proj = SinusoidMLP(width), SinusoidMLP(width)

    def forward(self, n_rows: int, flow: Tensor | None = None, fps: Tensor | None = None) -> Tensor:
        """``[B, 2, D]``; flow and fps ``[B]``, None for `DEFAULT_FLOW` and `DEFAULT_FPS`."""
        device = self.flow_proj.weight.device
        flow = torch.full((n_rows,), DEFAULT_FLOW, device=device) if flow is None else flow
        fps = torch.full((n_rows,), DEFAULT_FPS, device=device) if fps is None else fps
        return torch.stack([self.flow_proj(flow), self.fps_proj(fps)], dim=1)


class TextEmbed(nn.Module):
    """Text features, filled up to a fixed length from a learned table; all rows are attended to."""

    def __init__(self, token_dim: int, width: int, n_tokens: int) -> None:
        super().__init__()
        if n_tokens > N_TEXT_ROWS:
            raise ValueError(f"text_token_len: expected at most {N_TEXT_ROWS}, got {n_tokens}")
        self.n_tokens = n_tokens
        self.proj = nn.Linear(token_dim, width)
        self.norm = nn.LayerNorm(width)
        self.weight: Tensor
        self.register_buffer("weight", torch.randn(N_TEXT_ROWS, token_dim) * INIT_STD)

    def fill_up(self, features: Sequence[Tensor]) -> Tensor:
        """Texts of any lengths ``[n, token_dim]`` to ``[B, n_tokens, token_dim]``.

        Row i of the result is row i of the text, or of the table where the text has ended. Raises
        ValueError for texts that are too long or of another width.
        """
        token_dim = self.weight.shape[1]
        for x in features:
            if x.ndim != 2 or x.shape[1] != token_dim or len(x) > self.n_tokens:
                expected = f"[0 to {self.n_tokens}, {token_dim}]"
                raise ValueError(f"features: expected shape {expected}, got {list(x.shape)}")
        table = self.weight[: self.n_tokens]
        return torch.stack([torch.cat([x.to(table), table[len(x) :]]) for x in features])

    def forward(self, features: Tensor) -> Tensor:
        """``[B, n, token_dim]`` to ``[B, n, D]``."""
        return self.norm(self.proj(features))


class LabelEmbed(nn.Module):
    """A class label as the only token of the condition; label `N_CLASSES` means no class."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(N_CLASSES + 1, width) * INIT_STD)
        self.norm = nn.LayerNorm(width)

    def forward(self, labels: Tensor) -> Tensor:
        """Classes, int64 ``[B]``, to ``[B, 1, D]``."""
        return self.norm(F.embedding(labels[:, None], self.weight))


class MaskEmbed(nn.Module):
    """Learned tokens: ``bos_token`` stands before frame 0, ``mask_token`` for masked tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bos_token = nn.Parameter(torch.randn(1, width) * INIT_STD)
        self.mask_token = nn.Parameter(torch.randn(1, width) * INIT_STD)

    def forward(self, tokens: Tensor, visible: Tensor) -> Tensor:
        """``tokens`` [B, N, D] where ``visible`` (bool [B, N]), the mask token elsewhere."""
        return torch.where(visible[..., None], tokens, self.mask_token)
