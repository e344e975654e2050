"""A small NOVA with random weights: what `--random-weights` and many tests run."""

from __future__ import annotations

from dataclasses import replace

import torch

from vidgen.common.random_weights import fresh
from vidgen.ops import EAGER, Ops

from ..model.config import Arch, Decoder, Encoder, NovaConfig
from ..model.transformer import NovaTransformer
from ..pipeline import NovaPipeline
from ..sampling.schedules import FlowMatching
from ..text import TextFeatures
from ..vae.config import VAEConfig
from ..vae.vae import VideoVAE

SMALL = NovaConfig(
    image_size=(64, 96),
    text_token_dim=16,
    text_token_len=8,
    video_base_size=(4, 2, 3),
    video_mixer_rank=4,
    arch=Arch(Encoder(2, 32, 2), Encoder(4, 32, 2, 2), Decoder(2, 32)),
)
SMALL_VAE = {
    "block_out_channels": [4, 8, 8, 8],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 2,
}


def fresh_model(
    config: NovaConfig = SMALL,
    ops: Ops = EAGER,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> NovaTransformer:
    """For inference: in eval mode, without gradients."""
    model = fresh(lambda: NovaTransformer(config, ops), seed)
    return model.to(device, dtype).eval().requires_grad_(False)


def random_features(config: NovaConfig = SMALL, n_samples: int = 1, seed: int = 1) -> TextFeatures:
    """Prompts of different lengths, and empty negative ones."""
    generator, width = torch.Generator().manual_seed(seed), config.text_token_dim or 0
    lengths = [max(1, config.text_token_len - i) for i in range(n_samples)]
    prompts = [torch.randn(n, width, generator=generator) for n in lengths]
    return TextFeatures(prompts, [prompts[0][:0]] * n_samples)


def random_pipeline(
    size: tuple[int, int] | None = None,
    ops: Ops = EAGER,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    spatial_attention: str = "masked",
) -> NovaPipeline:
    """Without a text encoder.

    Args:
        size: height and width of the frames in pixels, those of `SMALL` by default.
    """
    config = SMALL if size is None else SMALL.resized(*size)
    config = replace(config, spatial_attention=spatial_attention)
    model = fresh_model(config, ops, dtype=dtype, device=device)
    vae = fresh(lambda: VideoVAE(VAEConfig.from_dict(SMALL_VAE)), seed=1)
    return NovaPipeline(model, vae.to(device, dtype).requires_grad_(False), FlowMatching())
