"""The layers of the causal video VAE, from which `vae` builds encoder and decoder.

Inputs and outputs are ``[B, C, T, H, W]``. Convolutions see only the past; normalisation and
attention work on each frame by itself. When a video is coded in chunks, a `Stream` holds what the
convolutions need of earlier chunks. Without a stream the input is a whole video.
"""

from itertools import pairwise, repeat

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidgen.common.layers import FrameAttention

from .config import VAEConfig

EPS = 1e-6


class Stream:
    """The last inputs of every convolution, kept from one chunk of a video to the next.

    Each video, and each spatial tile of it, has a stream of its own, which is passed to the calls
    for its chunks in order. The model keeps no state, so that several videos can be coded at once.
    """

    def __init__(self) -> None:
        # by convolution, [B, C, 1 or 2, H, W]
        self.frames: dict[nn.Module, Tensor] = {}


class FrameGroupNorm(nn.GroupNorm):
    """GroupNorm of each frame by itself."""

    def forward(self, x: Tensor) -> Tensor:  # [B, C, T, H, W]
        frames = super().forward(x.transpose(1, 2).flatten(0, 1))  # a view of x where T = 1
        return frames.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


class CausalConv3d(nn.Module):
    """3 x 3 x 3 convolution that sees the current and the two previous frames; or a 1 x 1 x 1 one.

    The input is preceded in time by the last ``kernel - stride`` frames of the chunk before, from
    the stream, and at the start of a video by ``kernel - 1`` frames of zeros.
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
        """``conv(x)``, or with a norm ``conv(silu(norm(x)))``."""
        if not self.n_past:
            return self.conv(x)
        past = None if stream is None else stream.frames.get(self)
        weight = self.conv.weight
        if past is None and x.shape[2] == 1:  # an image: only the last tap sees more than zeros
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
    """``x``, or with a norm ``silu(norm(x))``, appended to the past in time."""
    if norm is None:
        return torch.cat([past, x], dim=2)
    if torch.is_grad_enabled():
        return torch.cat([past, F.silu(norm(x))], dim=2)
    # Frame by frame, so that beside x and the result nothing is larger than a frame.
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
    """Halves rows and columns, or the frames after the first, by the convolution's stride."""

    def __init__(self, channels: int, stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, stride=stride)

    def forward(self, x: Tensor, stream: Stream | None) -> Tensor:
        return self.conv(x, stream)


class SpatialUpsample(nn.Module):
    """Doubles rows and columns. The convolution's channels are (channel, row, column)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, 4 * channels)

    def forward(self, x: Tensor, stream: Stream | None) -> Tensor:
        y = self.conv(x, stream).unflatten(1, (-1, 2, 2))  # [B, C, row, column, T, H, W]
        return y.permute(0, 1, 4, 5, 2, 6, 3).flatten(5, 6).flatten(3, 4)


class TemporalUpsample(nn.Module):
    """Doubles the frames after the first. The convolution's channels are (channel, frame)."""

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
