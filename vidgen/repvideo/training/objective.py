"""`vidgen train repvideo`: reads samples, and computes the loss of a batch.

A sample is a safetensors file with ``latents`` [T, C, h, w], scaled by the VAE's scaling factor,
and ``prompt_embeds`` [1, S, W], as in a file of features for `vidgen generate`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vidgen.common.samples import Sample, take_latents
from vidgen.common.trainer import Batch, Objective

from ..model.transformer import CogVideoXTransformer
from ..sampling.schedules import denoiser_table, shifted_alphas
from ..text import read_features
from .loss import add_noise, draw_timesteps, drop_text, training_step


class RepVideoObjective(Objective):
    """RepVideo or CogVideoX with its loss."""

    same = ("latents", "text")

    def __init__(self, model: CogVideoXTransformer, **options: Any) -> None:
        """Raises ValueError for image-to-video models."""
        config = model.config
        if config.in_channels != config.out_channels or config.ofs_embed_dim is not None:
            raise ValueError(
                f"checkpoint: expected a text-to-video model, of in_channels {config.out_channels} "
                f"and no ofs_embed_dim, got {config.in_channels} and {config.ofs_embed_dim}"
            )
        super().__init__(model, config.to_dict(), **options)
        shift = 1.0 if config.use_rotary_positional_embeddings else 3.0
        self.table: Tensor
        self.register_buffer("table", denoiser_table(shifted_alphas(shift)))

    def read(self, tensors: Sample) -> Sample:
        config = self.model.config
        latents, others = take_latents(tensors, (None, config.in_channels, None, None))
        patch, patch_t = config.patch_size, config.patch_size_t or 1
        n_frames, _, height, width = latents.shape
        if n_frames % patch_t or height % patch or width % patch:
            expected = f"whole patches of {patch_t} x {patch} x {patch}"
            raise ValueError(f"latents: expected {expected}, got {list(latents.shape)}")
        text = read_features(others, config.text_embed_dim).text
        if len(text) != 1:
            raise ValueError(f"prompt_embeds: expected one prompt, got {len(text)}")
        return {"latents": latents, "text": text[0]}

    def forward(self, batch: Batch) -> Tensor:
        latents, text = (torch.stack([x[name] for x in batch.samples]) for name in self.same)
        timestep = torch.cat([draw_timesteps(1, self.table, g) for g in batch.generators])
        size, device = latents.shape[1:], latents.device
        noise = [torch.randn(size, generator=g, device=device) for g in batch.generators]
        noised = add_noise(latents, torch.stack(noise), timestep, self.table)
        text = drop_text(text, batch.dropped(self.prompt_dropout))
        with self.autocast():
            return training_step(self.model, noised, text).loss.mean()
