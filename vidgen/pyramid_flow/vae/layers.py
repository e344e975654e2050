"""The layers of the causal video VAE, all of them from ``[B, C, T, H, W]`` to the same.

Convolutions see the past only, normalisation and attention one frame at a time. What a layer needs
of earlier chunks of a video it finds in the `Stream`; without one, the input is a whole video.
"""

from itertools import pairwise, repeat

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidgen.common.layers import FrameAttention

from .config import VAEConfig

EPS = 1e-6


class Stream:
    """What the convolutions remember of one video between its chunks.

    One per video (and per spatial tile): handed to every call for a chunk of it, in order. Models
    hold nothing of it, so any number of videos may be coded at the same time.
    """

    def __init__(self) -> None:
        self.frames: dict[
            nn.Module, Tensor
        ] = {}  # a convolution's last inputs [B, C, 1 or 2, H, W]


class FrameGroupNorm(nn.GroupNorm):
    """GroupNorm of each frame by itself."""

    def forward(self, x: Tensor) -> Tensor:  # [B, C, T, H, W]
        frames = super().forward(x.transpose(1, 2).flatten(0, 1))  # a view of x where T = 1
        return frames.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


class CausalConv3d(nn.Module):
    """3 x 3 x 3 convolution whose last tap in time is the present; 1 x 1 x 1 is the plain one.

    In time the input begins with the frames that the stream remembers: the windows of the next
    chunk start ``kernel - stride`` frames before it. A video begins with zeros.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 3,
        stride: tuple[int, int, int] = (1, 1, 1),
    ) -> None:
        super().__init__()
        padding = (0, kernel // 2, kernel // 2)
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride, padding)
        self.n_past = kernel - 1
        self.n_remembered = kernel - stride[0]

    def forward(
        self,
        x: Tensor,  # [B, C, T, H, W]
        stream: Stream | None = None,
        norm: FrameGroupNorm | None = None,
    ) -> Tensor:
        """``conv(x)``, or ``conv(silu(norm(x)))``: written at once where the convolution reads."""
        if not self.n_past:
            return self.conv(x)
        past = None if stream is None else stream.frames.get(self)
        weight = self.conv.weight
        if past is None and x.shape[2] == 1:  # an image: all but the last tap see zeros
            x = x if norm is None else F.silu(norm(x))
            weight = weight[:, :, -1:]
        else:
            if past is None:
                past = x.new_zeros(*x.shape[:2], self.n_past, *x.shape[3:])
            x = _append(past, x, norm)
        if stream is not None:
            missing = max(self.n_remembered - x.shape[2], 0)
            last = x[:, :, -self.n_remembered :]
            stream.frames[self] = F.pad(last, (0, 0, 0, 0, missing, 0)) if missing else last.clone()
        return F.conv3d(x, weight, self.conv.bias, self.conv.stride, self.conv.padding)


def _append(past: Tensor, x: Tensor, norm: FrameGroupNorm | None) -> Tensor:
    """``x``, or ``silu(norm(x))``, behind the past in time."""
    if norm is None:
        return torch.cat([past, x], dim=2)
    if torch.is_grad_enabled():
        return torch.cat([past, F.silu(norm(x))], dim=2)
    # Frame by frame: besides x and the result, nothing here is larger than a frame.
    n = past.shape[2]
    out = x.new_empty(*x.shape[:2], n + x.shape[2], *x.shape[3:])
    out[:, :, :n] = past
    for t in range(x.shape[2]):
        out[:, :, n + t : n + t + 1] = F.silu(norm(x[:, :, t : t + 1]), inplace=True)
    return out


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = FrameGroupNorm(groups, in_channels, EPS)
        self.conv1 = CausalConv3d(in_channels, channels)
        self.norm2 = FrameGroupNorm(groups, channels, EPS)
        self.conv2 = CausalConv3d(channels, channels)
        self.conv_shortcut = None
        if in_channels != channels:
            self.conv_shortcut = CausalConv3d(in_channels, channels, kernel=1)

    def forward(self, x: Tensor, stream: Stream | None) -> Tensor:
        y = self.conv1(x, stream, self.norm1)
        y = self.conv2(y, stream, self.norm2)
        y += x if self.conv_shortcut is None else self.conv_shortcut(x)
        return y


class MidBlock(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.resnets = _resnets(channels, channels, 2, groups)
        self.attentions = nn.ModuleList(
            [FrameAttention(channels, FrameGroupNorm(groups, channels, EPS))]
        )

    def forward(self, x: Tensor, stream: Stream | None) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, stream))
        return self.resnets[1](x, stream)


class Downsample(nn.Module):
    """Half the rows and columns, or half the frames after the first, by the stride."""

    def __init__(self, channels: int, stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, stride=stride)

    def forward(self, x: Tensor, stream: Stream | None) -> Tensor:
        return self.conv(x, stream)


class SpatialUpsample(nn.Module):
    """Twice the rows and columns; the convolution's channels are (channel, row, column)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, 4 * channels)

    def forward(self, x: Tensor, stream: Stream | None) -> Tensor:
        y = self.conv(x, stream).unflatten(1, (-1, 2, 2))  # [B, C, row, column, T, H, W]
        return y.permute(0, 1, 4, 5, 2, 6, 3).flatten(5, 6).flatten(3, 4)


class TemporalUpsample(nn.Module):
    """Twice the frames after the first; the convolution's channels are (channel, frame)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, 2 * channels)

    def forward(self, x: Tensor, stream: Stream | None) -> Tensor:
        is_start = stream is None or self.conv not in stream.frames
        y = self.conv(x, stream).unflatten(1, (-1, 2)).transpose(2, 3)  # [B, C, T, frame, H, W]
        y = y.flatten(2, 3)
        return y[:, :, 1:] if is_start else y


class DownBlock(nn.Module):
    def __init__(
        self, in_channels: int, channels: int, n_layers: int, groups: int,
        spatial: bool, temporal: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.resnets = _resnets(in_channels, channels, n_layers, groups)
        self.downsamplers = nn.ModuleList([Downsample(channels, (1, 2, 2))] if spatial else [])
        self.temporal_downsamplers = nn.ModuleList(
            [Downsample(channels, (2, 1, 1))] if temporal else []
        )

    def forward(self, x: Tensor, stream: Stream | None) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers, *self.temporal_downsamplers):
            x = layer(x, stream)
        return x


class UpBlock(nn.Module):
    def __init__(
        self, in_channels: int, channels: int, n_layers: int, groups: int,
        spatial: bool, temporal: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.resnets = _resnets(in_channels, channels, n_layers, groups)
        self.upsamplers = nn.ModuleList([SpatialUpsample(channels)] if spatial else [])
        self.temporal_upsamplers = nn.ModuleList([TemporalUpsample(channels)] if temporal else [])

    def forward(self, x: Tensor, stream: Stream | None) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers, *self.temporal_upsamplers):
            x = layer(x, stream)
        return x


def _resnets(in_channels: int, channels: int, n_layers: int, groups: int) -> nn.ModuleList:
    widths = [in_channels, *[channels] * n_layers]
    return nn.ModuleList([ResnetBlock(a, b, groups) for a, b in pairwise(widths)])


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels, groups = config.encoder_block_out_channels, config.encoder_norm_num_groups
        self.conv_in = CausalConv3d(config.encoder_in_channels, channels[0])
        levels = zip(
            (channels[0], *channels),
            channels,
            config.encoder_layers_per_block,
            repeat(groups),
            config.encoder_spatial_down_sample,
            config.encoder_temporal_down_sample,
            strict=False,
        )
        self.down_blocks = nn.ModuleList([DownBlock(*level) for level in levels])
        self.mid_block = MidBlock(channels[-1], groups)
        self.conv_norm_out = FrameGroupNorm(groups, channels[-1], EPS)
        self.conv_out = CausalConv3d(channels[-1], 2 * config.encoder_out_channels)

    def forward(self, x: Tensor, stream: Stream | None) -> Tensor:
        x = self.conv_in(x, stream)
        for block in (*self.down_blocks, self.mid_block):
            x = block(x, stream)
        return self.conv_out(x, stream, self.conv_norm_out)


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels, groups = config.decoder_block_out_channels[::-1], config.decoder_norm_num_groups
        self.conv_in = CausalConv3d(config.decoder_in_channels, channels[0])
        self.mid_block = MidBlock(channels[0], groups)
        levels = zip(
            (channels[0], *channels),
            channels,
            config.decoder_layers_per_block,
            repeat(groups),
            config.decoder_spatial_up_sample,
            config.decoder_temporal_up_sample,
            strict=False,
        )
        self.up_blocks = nn.ModuleList([UpBlock(*level) for level in levels])
        self.conv_norm_out = FrameGroupNorm(groups, channels[-1], EPS)
        self.conv_out = CausalConv3d(channels[-1], config.decoder_out_channels)

    def forward(self, x: Tensor, stream: Stream | None) -> Tensor:
        x = self.conv_in(x, stream)
        for block in (self.mid_block, *self.up_blocks):
            x = block(x, stream)
        return self.conv_out(x, stream, self.conv_norm_out)
