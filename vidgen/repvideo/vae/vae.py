"""CogVideoX's causal video VAE: the class of diffusers, with weights of diffusers or of SAT.

Pixels are ``[B, 3, F, H, W]`` in [-1, 1], F = 4 k + 1; latents ``[B, k + 1, C, H / 8, W / 8]``,
scaled to unit variance, with frames before channels as the transformer expects them. diffusers
encodes eight frames and decodes two latent frames at a time. Group norms are over such a chunk, so
other chunk sizes would give other numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidgen.common.checkpoint import load_exactly, read_folder, read_state_dict

# Parts of SAT's keys, with those of diffusers. `from_sat` also reverses the levels of the decoder.
RENAMED = (
    (r"^encoder\.down\.(\d+)", r"encoder.down_blocks.\1"),
    (r"mid\.block_1\.", "mid_block.resnets.0."),
    (r"mid\.block_2\.", "mid_block.resnets.1."),
    (r"\.block\.", ".resnets."),
    (r"\.downsample\.", ".downsamplers.0."),
    (r"\.upsample\.", ".upsamplers.0."),
    (r"nin_shortcut", "conv_shortcut"),
)
SAT_PREFIX = "first_stage_model."  # in training checkpoints
SPATIAL_FACTOR = 8  # pixels per latent, along each side


def load_vae(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Any:
    """The `AutoencoderKLCogVideoX` of a config.json with the weights of a checkpoint.

    Raises:
        ValueError: missing or unknown keys, other shapes.
    """
    from diffusers import AutoencoderKLCogVideoX

    with torch.device("meta"):
        vae: Any = AutoencoderKLCogVideoX.from_config(dict(config))
    load_exactly(vae, state)
    return vae.eval().requires_grad_(False)


def load_pretrained_vae(path: str | Path, **options: Any) -> Any:
    """The VAE in a folder of diffusers or in a file of SAT, such as the released 3d-vae.pt.

    Args:
        options: replace those of config.json. A file of SAT has no config: it is loaded with that
            of CogVideoX-2B, whose scaling factor differs from that of the larger models.
    """
    path = Path(path)
    if path.is_dir():
        config, state = read_folder(path)
        return load_vae({**config, **options}, state)
    if not path.exists():
        raise ValueError(f"vae: expected a folder or a file, {path} does not exist")
    return load_vae(options, from_sat(read_state_dict(path, within="state_dict")))


def from_sat(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the weights to diffusers' names; leaves out those of the training loss."""
    own = [key for key in state if key.startswith(SAT_PREFIX)] or list(state)
    own = [key for key in own if not key.removeprefix(SAT_PREFIX).startswith("loss")]
    ups = [int(m[1]) for key in own if (m := re.search(r"decoder\.up\.(\d+)\.", key))]
    last = max(ups, default=0)
    found = {}
    for key in own:
        name = re.sub(
            r"^decoder\.up\.(\d+)",
            lambda m: f"decoder.up_blocks.{last - int(m[1])}",
            key.removeprefix(SAT_PREFIX),
        )
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        found[name] = state[key]
    return found


def encode(vae: Any, pixels: Tensor) -> Tensor:
    """The mode of the latents, ``[B, T, C, h, w]``."""
    moments = vae.encode(pixels).latent_dist
    return (moments.mode() * vae.config.scaling_factor).transpose(1, 2)


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Pixels of latents ``[B, T, C, h, w]``."""
    return vae.decode(latents.transpose(1, 2) / vae.config.scaling_factor).sample
