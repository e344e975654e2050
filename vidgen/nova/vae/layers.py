"""The layers of the causal video VAE; inputs and results are ``[B, C, T, H, W]``.

Convolutions read only the present and past frames, but norms are over all frames of the clip. The
outer stages of the encoder work on each frame by itself.
"""

from collections.abc import Iterable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidgen.common.layers import FrameAttention

from .config import N_FRAME_STAGES, VAEConfig

EPS = 1e-6
NORM_PARTS = 8  # without gradients, channels are normalised in this many parts, to save memory


class FrameGroupNorm(nn.GroupNorm):
    """GroupNorm of each frame by itself."""

    def forward(self, input: Tensor) -> Tensor:  # [B, C, T, H, W]
        return _from_frames(super().forward(_to_frames(input)), input.shape)


class FrameConv(nn.Conv2d):
    """Convolution of each frame by itself, 3 x 3 or 1 x 1.

    Frames are padded with zeros: on all sides, or with stride 2 only right and below.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1
    ) -> None:
        padding = kernel // 2 if stride == 1 else 0
        super().__init__(in_channels, out_channels, kernel, stride, padding)

    def forward(self, input: Tensor, norm: nn.GroupNorm | None = None) -> Tensor:
        """``conv(x)``, or ``conv(silu(norm(x)))``."""
        x = input if norm is None else _activated(norm, input)
        frames = _pad_end(_to_frames(x), self.stride[1])
        return _from_frames(super().forward(frames), input.shape)


class CausalConv3d(nn.Conv3d):
    """Convolution over the present and past frames: 3 x 3 x 3, 1 x 3 x 3 or 1 x 1 x 1.

    In time, the clip is padded with copies of its first frame. In space, frames are padded with
    zeros: on all sides, or with stride 2 (in time as well) only right and below.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: tuple[int, int, int] | int = 3,
        stride: int = 1,
    ) -> None:
        time, rows, columns = (kernel,) * 3 if isinstance(kernel, int) else kernel
        padding = (0, rows // 2, columns // 2) if stride == 1 else 0
        super().__init__(in_channels, out_channels, (time, rows, columns), stride, padding)

    def forward(self, input: Tensor, norm: nn.GroupNorm | None = None) -> Tensor:
        """``conv(x)``, or ``conv(silu(norm(x)))`` without a copy for the padding in time."""
        x = _with_past(input, norm, self.kernel_size[0] - 1)
        return super().forward(_pad_end(x, self.stride[2]))


def _to_frames(x: Tensor) -> Tensor:
    """``[B T, C, H, W]``; no copy of what `_from_frames` returned."""
    return x.transpose(1, 2).flatten(0, 1)


def _from_frames(frames: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `_to_frames`, for clips of ``shape``."""
    return frames.unflatten(0, (shape[0], shape[2])).transpose(1, 2)


def _pad_end(x: Tensor, stride: int) -> Tensor:
    return x if stride == 1 else F.pad(x, (0, 1, 0, 1))


def _activated(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return F.silu(norm(x), inplace=not torch.is_grad_enabled())


def _with_past(x: Tensor, norm: nn.GroupNorm | None, n_past: int) -> Tensor:
    """``x``, or ``silu(norm(x))``, with ``n_past`` copies of its first frame in front."""
    if norm is None or torch.is_grad_enabled() or not n_past:
        x = x if norm is None else _activated(norm, x)
        past = x[:, :, :1].expand(-1, -1, n_past, -1, -1)
        return torch.cat([past, x], dim=2) if n_past else x
    # Groups are normalised a few at a time, so that no further tensor of the size of x is needed.
    out = x.new_empty(*x.shape[:2], n_past + x.shape[2], *x.shape[3:])
    size, n_groups = x.shape[1] // norm.num_groups, -(-norm.num_groups // NORM_PARTS)
    for begin in range(0, norm.num_groups, n_groups):
        end = min(begin + n_groups, norm.num_groups)
        part = slice(begin * size, end * size)
        y = F.group_norm(x[:, part], end - begin, norm.weight[part], norm.bias[part], norm.eps)
        out[:, part, n_past:] = F.silu(y, inplace=True)
    out[:, :, :n_past] = out[:, :, n_past : n_past + 1]
    return out


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, groups: int, is_3d: bool) -> None:
        super().__init__()
        conv, norm = (CausalConv3d, nn.GroupNorm) if is_3d else (FrameConv, FrameGroupNorm)
        self.norm1 = norm(groups, in_channels, EPS)
        self.conv1 = conv(in_channels, channels)
        self.norm2 = norm(groups, channels, EPS)
        self.conv2 = conv(channels, channels)
        self.conv_shortcut = None
        if in_channels != channels:
            self.conv_shortcut = conv(in_channels, channels, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x, self.norm1), self.norm2)
        y += x if self.conv_shortcut is None else self.conv_shortcut(x)
        return y


class MidBlock(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.resnets = _resnets(channels, channels, 2, groups, is_3d=True)
        norm = nn.GroupNorm(groups, channels, EPS)  # over the whole clip, not frame by frame
        self.attentions = nn.ModuleList([FrameAttention(channels, norm)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Downsample(nn.Module):
    """Halves rows and columns; the 3-D one also makes n + 1 frames of 2 n + 1."""

    def __init__(self, channels: int, is_3d: bool) -> None:
        super().__init__()
        self.conv = (CausalConv3d if is_3d else FrameConv)(channels, channels, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Doubles rows and columns, and with ``in_time`` all frames but the first."""

    def __init__(self, channels: int, in_time: bool) -> None:
        super().__init__()
        self.in_time = in_time
        self.conv = CausalConv3d(channels, channels, kernel=3 if in_time else (1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        if not self.in_time:
            return self.conv(F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest"))
        parts = [F.interpolate(x[:, :, :1], scale_factor=(1, 2, 2), mode="trilinear")]
        if x.shape[2] > 1:  # interpolated without the first frame
            parts.append(F.interpolate(x[:, :, 1:], scale_factor=(2, 2, 2), mode="trilinear"))
        return self.conv(torch.cat(parts, dim=2))


class Stage(nn.Module):
    """Residual blocks, then a layer that changes the size (but for the last stage)."""

    def __init__(self, resnets: nn.ModuleList) -> None:
        super().__init__()
        self.resnets = resnets
        self.downsamplers = nn.ModuleList()
        self.upsamplers = nn.ModuleList()

    def layers(self) -> list[nn.Module]:
        return [*self.resnets, *self.downsamplers, *self.upsamplers]


def _run(x: Tensor, layers: Iterable[nn.Module]) -> Tensor:
    """Runs the layers in one loop; nested modules would keep their first input alive."""
    for layer in layers:
        x = layer(x)
    return x


def _resnets(
    in_channels: int, channels: int, n_layers: int, groups: int, is_3d: bool
) -> nn.ModuleList:
    widths = [in_channels, *[channels] * n_layers]
    return nn.ModuleList([ResnetBlock(a, b, groups, is_3d) for a, b in pairwise(widths)])


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels, groups = config.block_out_channels, config.norm_num_groups
        n_layers, n_stages = config.layers_per_block, len(channels)
        self.conv_in = FrameConv(config.in_channels, channels[0])
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(channels):
            is_3d, next_is_3d = i >= N_FRAME_STAGES, i + 1 >= N_FRAME_STAGES
            stage = Stage(_resnets(channels[max(i - 1, 0)], width, n_layers, groups, is_3d))
            if i < n_stages - 1:
                stage.downsamplers.append(Downsample(width, next_is_3d))
            self.down_blocks.append(stage)
        self.mid_block = MidBlock(channels[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], EPS)
        self.conv_out = CausalConv3d(channels[-1], 2 * config.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        layers = [layer for stage in self.down_blocks for layer in stage.layers()]
        x = _run(x, [self.conv_in, *layers, self.mid_block])
        return self.conv_out(x, self.conv_norm_out)


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels, groups = config.block_out_channels[::-1], config.norm_num_groups
        n_layers, n_stages = config.layers_per_block + 1, len(channels)
        self.conv_in = CausalConv3d(config.latent_channels, channels[0])
        self.mid_block = MidBlock(channels[0], groups)
        self.up_blocks = nn.ModuleList()
        for i, width in enumerate(channels):
            stage = Stage(_resnets(channels[max(i - 1, 0)], width, n_layers, groups, is_3d=True))
            if i < n_stages - 1:
                stage.upsamplers.append(Upsample(width, in_time=i < n_stages - N_FRAME_STAGES))
            self.up_blocks.append(stage)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], EPS)
        self.conv_out = CausalConv3d(channels[-1], config.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        layers = [layer for stage in self.up_blocks for layer in stage.layers()]
        x = _run(x, [self.conv_in, self.mid_block, *layers])
        return self.conv_out(x, self.conv_norm_out)
