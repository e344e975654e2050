"""A small RepVideo with random weights: what `--random-weights` and many tests run."""

from __future__ import annotations

from typing import Any

import torch

from vidgen.common.random_weights import fresh
from vidgen.ops import Ops

from ..model.config import CogVideoXConfig
from ..model.transformer import CogVideoXTransformer
from ..pipeline import VideoSize
from ..text import Prompts

SMALL = CogVideoXConfig(
    num_attention_heads=2,
    attention_head_dim=16,
    time_embed_dim=16,
    text_embed_dim=16,
    num_layers=8,
    sample_width=8,
    sample_height=6,
    sample_frames=9,
    max_text_seq_length=8,
    gates=True,
)
SMALL_SIZE = VideoSize(48, 64, 9)
SMALL_VAE = {"block_out_channels": (4, 4, 8, 8), "norm_num_groups": 2, "layers_per_block": 1}


def fresh_model(ops: Ops, seed: int) -> CogVideoXTransformer:
    return fresh(lambda: CogVideoXTransformer(SMALL, ops), seed)


def fresh_vae(seed: int) -> Any:
    """An `AutoencoderKLCogVideoX` of diffusers."""
    from diffusers import AutoencoderKLCogVideoX

    return fresh(lambda: AutoencoderKLCogVideoX(**SMALL_VAE), seed)


def random_prompts(generator: torch.Generator) -> Prompts:
    """Features of one prompt, none for guidance to lead away from."""
    shape = 1, SMALL.max_text_seq_length, SMALL.text_embed_dim
    return Prompts(torch.randn(shape, generator=generator), None)
