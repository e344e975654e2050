"""A small pipeline with random weights, to try the commands without a checkpoint.

Its videos are noise. `vidgen generate --random-weights`, `vidgen train` and tests use it.
"""

from __future__ import annotations

import torch

from vidgen.ops import FUSED, Ops

from ..model.config import FluxConfig, MMDiTConfig
from ..offload import Placement
from ..pipeline import PyramidFlowPipeline
from ..text import Prompts, TextFeatures
from ..vae.config import VAEConfig
from ..vae.vae import CausalVideoVAE
from .example import example_model

SMALL = FluxConfig(
    in_channels=16,
    num_layers=1,
    num_single_layers=1,
    num_attention_heads=1,
    joint_attention_dim=32,
    pooled_projection_dim=16,
)
SMALL_VAE = VAEConfig(
    encoder_out_channels=4,
    encoder_layers_per_block=(1, 1, 1, 1),
    encoder_block_out_channels=(8, 8, 8, 8),
    encoder_norm_num_groups=2,
    decoder_in_channels=4,
    decoder_layers_per_block=(1, 1, 1, 1),
    decoder_block_out_channels=(8, 8, 8, 8),
    decoder_norm_num_groups=2,
)
SMALL_SIZE = (64, 128)  # height, width of a frame


def random_pipeline(
    config: FluxConfig | MMDiTConfig = SMALL,
    vae_config: VAEConfig = SMALL_VAE,
    ops: Ops = FUSED,
    *,
    dtype: torch.dtype = torch.float32,
    placement: Placement | None = None,
    seed: int = 0,
) -> PyramidFlowPipeline:
    """A pipeline without text encoders."""
    transformer = example_model(config, ops, dtype=dtype, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = CausalVideoVAE(vae_config).to(dtype)
    return PyramidFlowPipeline(transformer, vae, placement=placement)


def random_prompts(
    config: FluxConfig | MMDiTConfig = SMALL, n: int = 1, *, length: int = 16, seed: int = 0
) -> Prompts:
    """Features of n prompts, whose last token is padding, and of a one-token negative prompt."""
    generator = torch.Generator().manual_seed(seed)

    def features(n: int, n_tokens: int) -> TextFeatures:
        mask = (torch.arange(length) < n_tokens).long().expand(n, -1)
        text = torch.randn(n, length, config.joint_attention_dim, generator=generator)
        pooled = torch.randn(n, config.pooled_projection_dim, generator=generator)
        return TextFeatures(text, mask, pooled)

    return Prompts(features(n, length - 1), features(1, 1))
