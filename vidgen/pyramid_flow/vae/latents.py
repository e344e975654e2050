"""Normalisation of latents: the transformer works on normalised ones, the VAE does not.

The pipeline and the golden cases normalise what the VAE encodes, and undo it before decoding.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class LatentStats(NamedTuple):
    """``(shift, scale)`` for the latents of images and first frames, and for all later frames."""

    image: tuple[float, float]
    video: tuple[float, float]


# By the official name of the transformer trained on such latents.
LATENT_STATS = {
    "pyramid_flux": LatentStats(image=(-0.04, 1 / 1.8726), video=(-0.2343, 1 / 3.0986)),
    "pyramid_mmdit": LatentStats(image=(0.1490, 1 / 1.8415), video=(-0.2343, 1 / 3.0986)),
}


def normalize_latents(
    latents: Tensor,  # [B, C, T, h, w]
    stats: LatentStats,
    *,
    start: int = 0,
) -> Tensor:
    """``(latents - shift) * scale``. The first frame given is latent frame ``start`` of its video.

    Raises:
        ValueError: a negative start.
    """
    n_images = _n_images(start)
    (shift, scale), (video_shift, video_scale) = stats
    image = (latents[:, :, :n_images] - shift) * scale
    video = (latents[:, :, n_images:] - video_shift) * video_scale
    return torch.cat([image, video], dim=2)


def denormalize_latents(
    latents: Tensor,  # [B, C, T, h, w]
    stats: LatentStats,
    *,
    start: int = 0,
) -> Tensor:
    """``latents / scale + shift``, the inverse of `normalize_latents`, with the same errors."""
    n_images = _n_images(start)
    (shift, scale), (video_shift, video_scale) = stats
    image = latents[:, :, :n_images] / scale + shift
    video = latents[:, :, n_images:] / video_scale + video_shift
    return torch.cat([image, video], dim=2)


def _n_images(start: int) -> int:
    if start < 0:
        raise ValueError(f"start: expected a frame index of at least 0, got {start}")
    return 1 if start == 0 else 0
