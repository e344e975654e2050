"""Text features to pixels: draws the noise, runs the sampling loop, decodes the latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vidgen.common.progress import SILENT, Progress

from .model.config import CogVideoXConfig
from .model.transformer import CogVideoXTransformer
from .sampling.sampler import Guidance, draw_normal, sample
from .sampling.schedules import Step
from .text import Prompts
from .vae.vae import SPATIAL_FACTOR, decode


@dataclass(frozen=True)
class VideoSize:
    """Pixels and frames of a video."""

    height: int = 480
    width: int = 720
    n_frames: int = 49

    def latent_shape(self, config: CogVideoXConfig) -> tuple[int, int, int, int]:
        """``[T, C, h, w]``; for CogVideoX 1.5, T is rounded up to a multiple of its patch.

        Raises:
            ValueError: a size that is not a multiple of the patch, a number of frames other than
                4 k + 1, or a model that needs more input than text.
        """
        if config.in_channels != config.out_channels or config.ofs_embed_dim is not None:
            raise ValueError(
                f"transformer: expected {config.out_channels} channels and no ofs_embed_dim for "
                f"text to video, got {config.in_channels} and {config.ofs_embed_dim}"
            )
        patch = SPATIAL_FACTOR * config.patch_size
        for name, side in (("height", self.height), ("width", self.width)):
            if side < patch or side % patch:
                raise ValueError(f"{name}: expected a multiple of {patch}, got {side}")
        n_latent = self.latent_frames(config)
        n_latent += -n_latent % (config.patch_size_t or 1)
        sides = self.height // SPATIAL_FACTOR, self.width // SPATIAL_FACTOR
        return n_latent, config.in_channels, *sides

    def latent_frames(self, config: CogVideoXConfig) -> int:
        """The number of latent frames that are decoded."""
        ratio = config.temporal_compression_ratio
        if self.n_frames < 1 or (self.n_frames - 1) % ratio:
            raise ValueError(f"frames: expected 1 + a multiple of {ratio}, got {self.n_frames}")
        return (self.n_frames - 1) // ratio + 1

    def check_decodable(self, config: CogVideoXConfig) -> None:
        """ValueError for an even number of latent frames, of which the VAE makes other frames.

        It decodes two latent frames at a time, and three the first time: of an even number it
        takes the first two as if they were two later ones.
        """
        if self.latent_frames(config) % 2 == 0:
            step = 2 * config.temporal_compression_ratio
            below = (self.n_frames - 1) // step * step + 1
            raise ValueError(
                f"frames: expected 1 + a multiple of {step}, as the VAE decodes them, such as "
                f"{below} or {below + step}, got {self.n_frames}"
            )


@dataclass(frozen=True)
class Sampling:
    """Steps and guidance of a sampling run."""

    steps: Sequence[Step]  # from `sat_schedule` or `diffusers_schedule`
    guidance: Guidance = field(default_factory=Guidance)
    # None: the dtype of the text, as in diffusers, which rounds to it after every step
    latent_dtype: torch.dtype | None = torch.float32


class RepVideoPipeline:
    """RepVideo or CogVideoX, with a VAE of diffusers."""

    def __init__(self, transformer: CogVideoXTransformer, vae: Any) -> None:
        for name, got, expected in (
            ("channels", vae.config.latent_channels, transformer.config.in_channels),
            ("pixels per latent", 2 ** (len(vae.config.block_out_channels) - 1), SPATIAL_FACTOR),
        ):
            if got != expected:
                raise ValueError(f"vae: expected {expected} {name}, got {got}")
        self.transformer, self.vae = transformer, vae

    @torch.no_grad()
    def __call__(
        self,
        prompts: Prompts,
        size: VideoSize,
        sampling: Sampling,
        generator: torch.Generator | None = None,
        progress: Progress = SILENT,
    ) -> Tensor:
        """Pixels ``[B, 3, F, H, W]``, about -1 to 1, in the dtype of the VAE.

        Args:
            generator: of the noise, on any device.

        Raises:
            ValueError: a size that the transformer or the VAE cannot make, before any work.
        """
        size.check_decodable(self.transformer.config)
        latents = make_latents(self.transformer, prompts, size, sampling, generator, progress)
        # frames that were added to complete a patch are in front
        latents = latents[:, -size.latent_frames(self.transformer.config) :]
        return decode(self.vae, latents.to(self.vae.dtype))


def make_latents(
    transformer: CogVideoXTransformer,
    prompts: Prompts,
    size: VideoSize,
    sampling: Sampling,
    generator: torch.Generator | None = None,
    progress: Progress = SILENT,
) -> Tensor:
    """Latents ``[B, T, C, h, w]``; without unconditional features there is no guidance."""
    text, uncond = prompts
    shape = len(text), *size.latent_shape(transformer.config)
    return sample(
        transformer,
        draw_normal(shape, sampling.latent_dtype or text.dtype, text.device, generator),
        text,
        uncond,
        sampling.steps,
        guidance=None if uncond is None else sampling.guidance,
        ops=transformer.ops,
        progress=progress,
    )
