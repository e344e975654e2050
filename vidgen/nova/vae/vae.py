"""The VAEs of NOVA with one interface: video in [-1, 1] to scaled latents and back.

`ImageVAE` is the 8 x 8 autoencoder of Stable Diffusion, for models of images. `VideoVAE` is the
causal VAE of Open-Sora-Plan: 8 x 8 pixels and 4 frames become one latent of 4 channels. Frame 0 is
encoded alone, then every 4 frames give one latent frame, ``F = 1 + 4 (T - 1)``.

As in the released code, `VideoVAE` works in tiles of 17 frames or 5 latent frames; the first frame
of a tile is the last one of the tile before. Each tile is encoded or decoded as a video of its own,
and the result for the shared frame is dropped. This differs from one pass over the whole video, but
it is what the released code computes. (Chunks that carry over the inputs of convolutions would not
give the result of one pass either, since norms are over all frames.) The released code drops an
incomplete last tile, so that 8 latent frames give 17 frames; here that tile is decoded too, and
they give 29.

Shapes: B batch, C channels, F pixel frames, T latent frames, H x W pixels, h x w latents.
Module names are those of the released checkpoints; paper: Deng et al., Autoregressive Video
Generation without Vector Quantization, arXiv:2412.14169.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vidgen.common.checkpoint import load_exactly, read_folder
from vidgen.common.posterior import Posterior, check_volume

from .config import RELEASED, VAEConfig
from .layers import CausalConv3d, Decoder, Encoder

TILE_LATENTS = 5  # latent frames to a tile, the first one shared with the tile before


class VAE(nn.Module, ABC):
    """Encoder and decoder; latents are scaled as the transformer expects them.

    Attributes:
        latent_channels: C.
        scaling_factor: latents are samples of the posterior times this.
        spatial_factor: pixels per latent, in rows and in columns.
        temporal_factor: frames per latent frame, after the first.
        overflows_in_fp16: whether its config.json asks for fp32 instead of fp16.
    """

    latent_channels: int
    scaling_factor: float
    spatial_factor: int
    temporal_factor: int
    overflows_in_fp16 = False

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.parameters()).dtype

    def latents_to_frames(self, n_latents: int) -> int:
        """The number of frames that ``n_latents`` latent frames are decoded to."""
        return 1 + self.temporal_factor * (n_latents - 1)

    def posterior(self, video: Tensor) -> Posterior:
        """The distribution of a video's latents, not scaled; an image is a video of one frame.

        Args:
            video: ``[B, 3, 1 + 4 k, H, W]`` in [-1, 1]; for images ``[B, 3, F, H, W]``. H and W
                are multiples of 8.

        Raises:
            ValueError: for other shapes and frame counts.
        """
        check_volume("video", video, 3)
        n_frames, factor = video.shape[2], self.temporal_factor
        if (n_frames - 1) % factor:
            raise ValueError(f"video: expected {factor} k + 1 frames, got {n_frames}")
        if any(n % self.spatial_factor for n in video.shape[3:]):
            raise ValueError(
                f"video: expected multiples of {self.spatial_factor} pixels, "
                f"got {' x '.join(map(str, video.shape[3:]))}"
            )
        return Posterior(torch.cat(list(self._encode_tiles(video)), dim=2))

    def encode(
        self,
        video: Tensor,
        generator: torch.Generator | None = None,
        *,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Scaled latents ``[B, C, T, h, w]`` drawn from the `posterior`, by ``noise`` if given."""
        return self.posterior(video).sample(generator, noise=noise) * self.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """The video ``[B, 3, F, 8 h, 8 w]`` of scaled latents ``[B, C, T, h, w]``.

        Raises:
            ValueError: for other shapes.
        """
        return torch.cat(list(self.decode_chunks(latents)), dim=2)

    def decode_chunks(self, latents: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
        """`decode` in parts, with memory that does not depend on the length of the video.

        Args:
            latents: as for `decode`; or an iterator of chunks of any number of latent frames, for
                example a sampler that is still running.

        Yields:
            The frames of one part after another.
        """
        if isinstance(latents, Tensor):
            self._check_latents(latents)  # now, not when the first part is requested
            latents = [latents]
        return self._decode_tiles(self._unscaled(latents))

    def _unscaled(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        first = None
        for chunk in chunks:
            self._check_latents(chunk)
            first = chunk.shape if first is None else first
            if (chunk.shape[0], chunk.shape[3:]) != (first[0], first[3:]):
                raise ValueError(
                    f"chunk: expected the batch and frame size of {list(first)}, the "
                    f"first one, got {list(chunk.shape)}"
                )
            yield chunk / self.scaling_factor

    def _check_latents(self, latents: Tensor) -> None:
        check_volume("latents", latents, self.latent_channels)

    @abstractmethod
    def _encode_tiles(self, video: Tensor) -> Iterator[Tensor]:
        """Moments ``[B, 2 C, T, h, w]`` in parts."""

    @abstractmethod
    def _decode_tiles(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Frames of unscaled latents, in parts."""


class VideoVAE(VAE):
    """The causal video VAE, see the module's docstring."""

    def __init__(self, config: VAEConfig = RELEASED) -> None:
        super().__init__()
        self.config = config
        self.latent_channels, self.scaling_factor = config.latent_channels, config.scaling_factor
        self.spatial_factor, self.temporal_factor = config.spatial_factor, config.temporal_factor
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        moments, latent = 2 * config.latent_channels, config.latent_channels
        self.quant_conv = CausalConv3d(moments, moments, kernel=1)
        self.post_quant_conv = CausalConv3d(latent, latent, kernel=1)

    def _encode_tiles(self, video: Tensor) -> Iterator[Tensor]:
        for i, tile in enumerate(time_tiles([video], self.latents_to_frames(TILE_LATENTS))):
            moments = self.quant_conv(self.encoder(tile))
            yield moments[:, :, 1:] if i else moments

    def _decode_tiles(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        for i, tile in enumerate(time_tiles(chunks, TILE_LATENTS)):
            frames = self.decoder(self.post_quant_conv(tile))
            yield frames[:, :, 1:] if i else frames


class ImageVAE(VAE):
    """The autoencoder of diffusers; the frames of a video are encoded and decoded one by one.

    Args:
        model: an ``AutoencoderKL``. That of Stable Diffusion XL overflows in fp16 (its config says
            ``force_upcast``).
    """

    temporal_factor = 1

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model
        config: Any = model.config
        for key in ("shift_factor", "latents_mean", "latents_std"):
            if config.get(key) is not None:
                raise ValueError(f"{key}: expected None, got {config[key]!r}")
        self.latent_channels, self.scaling_factor = config.latent_channels, config.scaling_factor
        self.spatial_factor = 2 ** (len(config.block_out_channels) - 1)
        self.overflows_in_fp16 = bool(config.force_upcast)

    def _encode_tiles(self, video: Tensor) -> Iterator[Tensor]:
        for frame in video.unbind(dim=2):
            yield self.model.encode(frame).latent_dist.parameters.unsqueeze(2)

    def _decode_tiles(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        for chunk in chunks:
            for latents in chunk.unbind(dim=2):
                yield self.model.decode(latents).sample.unsqueeze(2)


def time_tiles(
    chunks: Iterable[Tensor],  # [B, C, any number of frames, H, W]
    size: int,
) -> Iterator[Tensor]:
    """Tiles of ``size`` frames, each beginning with the last frame of the tile before.

    The last tile may be shorter; there is none if only the shared frame is left.
    """
    held, is_first = None, True
    for chunk in chunks:
        held = chunk if held is None else torch.cat([held, chunk], dim=2)
        while held.shape[2] >= size:
            yield held[:, :, :size]
            held, is_first = held[:, :, size - 1 :], False
    if held is not None and (is_first or held.shape[2] > 1):
        yield held


def load_vae(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> VAE:
    """The VAE of a config.json with the weights of a checkpoint, in their dtype.

    An `ImageVAE` if ``_class_name`` is ``AutoencoderKL``, else a `VideoVAE`.
    Errors: `load_exactly`.
    """
    with torch.device("meta"):
        if config.get("_class_name") == "AutoencoderKL":
            from diffusers import AutoencoderKL

            model: Any = AutoencoderKL.from_config(dict(config))
            load_exactly(model, state)
            vae: VAE = ImageVAE(model)
        else:
            vae = VideoVAE(VAEConfig.from_dict(config))
            load_exactly(vae, state)
    return vae.eval()


def load_pretrained_vae(folder: str | Path) -> VAE:
    """The VAE in a folder with config.json and weights: ``vae`` of a released model."""
    return load_vae(*read_folder(folder))
