"""The causal video VAE of Pyramid Flow: 8 x 8 pixels and 8 frames to one latent of 16 channels.

Frame 0 is coded alone (an image is a video of one frame), every 8 later frames give one latent
frame: ``F = 1 + 8 (T - 1)``. Convolutions see only the past; normalisation and attention work on
each frame by itself. So a video can be coded in chunks of time, with the same result up to
rounding. The pipeline encodes given frames with it and decodes what the sampler makes.

Shapes: B batch, C channels, F pixel frames, T frames of a layer or of the latent, H x W pixels.
Module names are those of the released checkpoints (`CausalVideoVAE` of jy0205/Pyramid-Flow);
paper: Jin et al., Pyramidal Flow Matching for Efficient Video Generative Modeling,
arXiv:2410.05954.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vidgen.common.posterior import Posterior, check_volume

from .config import RELEASED, VAEConfig
from .layers import CausalConv3d, Decoder, Encoder, Stream
from .tiling import Tiling, decode_tiling, encode_tiling, run_tiled

Coder = Callable[[Tensor, Stream | None], Tensor]


class CausalVideoVAE(nn.Module):
    """Encoder and decoder between video in [-1, 1] and latents (not normalised: see `latents`).

    Two options of its methods save memory. With ``window`` time is coded in chunks of so many
    frames (encoding) or latent frames (decoding), which is exact. With ``tile`` space is coded in
    overlapping squares of so many pixels, which changes the result a little (see `tiling`). The
    official pipeline decodes in tiles of 512 pixels and windows of 2, or 256 and 1 to save memory.
    """

    def __init__(self, config: VAEConfig = RELEASED) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        moments, latent = 2 * config.encoder_out_channels, config.decoder_in_channels
        self.quant_conv = CausalConv3d(moments, moments, kernel=1)
        self.post_quant_conv = CausalConv3d(latent, latent, kernel=1)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> CausalVideoVAE:
        """The model of a config.json, freshly initialised. Errors: as for `VAEConfig.from_dict`."""
        return cls(VAEConfig.from_dict(config))

    def encode(
        self, video: Tensor, *, window: int | None = None, tile: int | None = None
    ) -> Posterior:
        """The distribution of a video's latents; an image is a video of one frame.

        Args:
            video: ``[B, 3, 1 + 8 k, H, W]``.
            window: frames per chunk, a multiple of 8; the first chunk has one more.
            tile: side of a tile in pixels, a multiple of 32; smaller frames are not tiled.

        Returns:
            A `Posterior` over latents ``[B, C, 1 + k, H / 8, W / 8]`` (rounded up).

        Raises:
            ValueError: other shapes, frame counts, windows or tiles.
        """
        self._check_video(video)
        window = None if window is None else self._check_encode_window(window)
        return Posterior(_code_whole(self._encode, video, window, self._encode_tiling(tile)))

    def encode_chunks(
        self, video: Tensor | Iterable[Tensor], *, window: int = 16, tile: int | None = None
    ) -> Iterator[Posterior]:
        """`encode` one chunk after another, in memory independent of the video's length.

        Args:
            video: as for `encode`; or an iterable of its chunks: ``1 + 8 k`` frames, then any
                multiples of 8.
            window: frames per chunk, unless ``video`` is in chunks already.
            tile: as for `encode`; the streams of all tiles are in memory at once.

        Yields:
            The `Posterior` of each chunk.
        """
        tiling = self._encode_tiling(tile)
        chunks = _chunks(video, self._check_encode_window(window), self._check_video)
        return map(Posterior, _code_chunks(self._encode, chunks, tiling))

    def decode(
        self, latents: Tensor, *, window: int | None = None, tile: int | None = None
    ) -> Tensor:
        """The video of latents.

        Args:
            latents: ``[B, C, T, h, w]``.
            window: latent frames per chunk; the first chunk has one more.
            tile: side of a tile in pixels, a multiple of 32; smaller frames are not tiled.

        Returns:
            ``[B, 3, 1 + 8 (T - 1), 8 h, 8 w]``.

        Raises:
            ValueError: other shapes, windows or tiles.
        """
        self._check_latents(latents)
        window = None if window is None else _check_window(window, multiple=1)
        return _code_whole(self._decode, latents, window, self._decode_tiling(tile))

    def decode_chunks(
        self, latents: Tensor | Iterable[Tensor], *, window: int = 2, tile: int | None = None
    ) -> Iterator[Tensor]:
        """`decode` one chunk after another, in memory independent of the video's length.

        Args:
            latents: as for `decode`; or an iterable of chunks of any number of latent frames, for
                example from a sampler that has not made the next one yet.
            window: latent frames per chunk, unless ``latents`` is in chunks already.
            tile: as for `decode`; the streams of all tiles are in memory at once.

        Yields:
            The frames of each chunk: 8 for each latent frame, 1 for the first of the video.
        """
        tiling = self._decode_tiling(tile)
        chunks = _chunks(latents, _check_window(window, multiple=1), self._check_latents)
        return _code_chunks(self._decode, chunks, tiling)

    def forward(
        self, video: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Posterior, Tensor]:
        """For training: the posterior, and the video decoded from a sample of it."""
        posterior = self.encode(video)
        return posterior, self.decode(posterior.sample(generator))

    def _encode(self, video: Tensor, stream: Stream | None) -> Tensor:
        return self.quant_conv(self.encoder(video, stream))

    def _decode(self, latents: Tensor, stream: Stream | None) -> Tensor:
        return self.decoder(self.post_quant_conv(latents), stream)

    def _encode_tiling(self, tile: int | None) -> Tiling | None:
        return None if tile is None else encode_tiling(tile, self.config.spatial_factor)

    def _decode_tiling(self, tile: int | None) -> Tiling | None:
        return None if tile is None else decode_tiling(tile, self.config.spatial_factor)

    def _check_encode_window(self, window: int) -> int:
        return _check_window(window, multiple=self.config.temporal_factor)

    def _check_video(self, video: Tensor, is_start: bool = True) -> None:
        check_volume("video", video, self.config.encoder_in_channels)
        factor, n_frames = self.config.temporal_factor, video.shape[2]
        if (n_frames - is_start) % factor:
            expected = f"{factor} k + 1" if is_start else f"a multiple of {factor}"
            raise ValueError(f"video: expected {expected} frames, got {n_frames}")

    def _check_latents(self, latents: Tensor, is_start: bool = True) -> None:
        check_volume("latents", latents, self.config.decoder_in_channels)


def _check_window(window: int, multiple: int) -> int:
    if window < 1 or window % multiple:
        raise ValueError(f"window: expected a positive multiple of {multiple}, got {window}")
    return window


def _chunks(
    x: Tensor | Iterable[Tensor], window: int, check: Callable[[Tensor, bool], None]
) -> Iterator[Tensor]:
    """A tensor in chunks of ``window`` frames, the first with one more; or the chunks given."""
    if isinstance(x, Tensor):
        check(x, True)
        return _split(x, window)
    return _checked(x, check)


def _split(x: Tensor, window: int) -> Iterator[Tensor]:
    yield x[:, :, : window + 1]
    for t in range(window + 1, x.shape[2], window):
        yield x[:, :, t : t + window]


def _checked(chunks: Iterable[Tensor], check: Callable[[Tensor, bool], None]) -> Iterator[Tensor]:
    first = None
    for chunk in chunks:
        check(chunk, first is None)
        if first is not None and (chunk.shape[0], chunk.shape[3:]) != (first[0], first[3:]):
            raise ValueError(
                f"chunk: expected the batch and frame size of {list(first)}, the "
                f"first one, got {list(chunk.shape)}"
            )
        first = chunk.shape if first is None else first
        yield chunk


def _code_whole(code: Coder, x: Tensor, window: int | None, tiling: Tiling | None) -> Tensor:
    """Codes all chunks of a tile before the next tile, with one stream in memory at a time."""

    def code_tile(tile: Tensor, _: tuple[int, int]) -> Tensor:
        if window is None:
            return code(tile, None)
        stream = Stream()
        return torch.cat([code(chunk, stream) for chunk in _split(tile, window)], dim=2)

    return run_tiled(x, tiling, code_tile)


def _code_chunks(code: Coder, chunks: Iterable[Tensor], tiling: Tiling | None) -> Iterator[Tensor]:
    """Codes all tiles of a chunk before the next chunk, so that memory does not grow with time."""
    streams: dict[tuple[int, int], Stream] = defaultdict(Stream)
    for chunk in chunks:
        yield run_tiled(chunk, tiling, lambda tile, place: code(tile, streams[place]))
