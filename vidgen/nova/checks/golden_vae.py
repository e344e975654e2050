"""The golden case of NOVA's video VAE: recomputes what it records."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vidgen.common.golden import Results
from vidgen.ops import Ops

from ..vae.vae import TILE_LATENTS, VideoVAE, load_vae

# Parts of the case's config that describe its weights, not the model.
RECIPE = ("keys", "key_shapes", "weight_recipe")


def recipe_weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """The fp32 weights of ``config.weight_recipe``: sines of the running number of an element."""
    weights, begin = {}, 0
    for key in sorted(shapes):
        shape, size = shapes[key], math.prod(shapes[key])
        n = torch.arange(begin, begin + size, dtype=torch.float64)
        begin += size
        if len(shape) > 1:
            amplitude = math.sqrt(2 / math.prod(shape[1:]))
            values = amplitude * torch.sin(1.7 * n + 2.1 * torch.sin(0.013 * n))
        elif "norm" in key and key.endswith("weight"):
            values = 1 + 0.1 * torch.sin(n)
        else:
            values = 0.05 * torch.sin(n)
        weights[key] = values.reshape(*shape).float()
    return weights


def vae_opensora(
    config: dict[str, Any], w: dict[str, Tensor], inputs: dict[str, Tensor], ops: Ops,
    outputs: Sequence[str],
) -> Results:  # fmt: skip
    """Moments of the video and its first frame; decoded frames of the first N latent frames.

    ``dec{N}`` are all frames, ``dec{N}_tail`` frames 12 to 23, ``dec{N}_frames`` the number of
    frames that the released code returns, which drops an incomplete last tile.
    """
    video, latents = inputs["video"], inputs["latent"]
    weights = recipe_weights(config["key_shapes"])
    own = {key: value for key, value in config.items() if key not in RECIPE}
    vae = load_vae(own, {key: x.to(video) for key, x in weights.items()})
    assert isinstance(vae, VideoVAE)
    sums = [weights[key].double() for key in config["keys"]]
    results: Results = {
        "w_sum": torch.stack([x.sum() for x in sums]),
        "w_abs": torch.stack([x.abs().sum() for x in sums]),
    }
    with torch.no_grad():
        results["moments"] = vae.posterior(video).moments
        results["moments_image"] = vae.posterior(video[:, :, :1]).moments.squeeze(2)
        for name in outputs:
            if not (named := re.fullmatch(r"dec(\d+)(_tail|_frames)?", name)):
                continue
            n_latents, part = int(named[1]), named[2]
            if part == "_frames":
                n_latents = complete_latents(n_latents)
            frames = vae.decode(latents[:, :, :n_latents] * vae.scaling_factor)
            if part == "_frames":
                results[name] = torch.tensor([frames.shape[2]])
            else:
                results[name] = frames[:, :, 12:24] if part else frames
    return results


def complete_latents(n_latents: int) -> int:
    """The latent frames in complete tiles; a single tile may be incomplete."""
    return n_latents - max(n_latents - 1, TILE_LATENTS - 1) % (TILE_LATENTS - 1)


KINDS = {"vae_opensora": vae_opensora}
