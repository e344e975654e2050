"""Loads the VAE from official checkpoints, whose keys must fit exactly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidgen.common.checkpoint import load_exactly, read_folder

from .vae import CausalVideoVAE


def load_vae(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> CausalVideoVAE:
    """The VAE of a config.json with the weights of a checkpoint, in their dtype.

    Of a training checkpoint, ``read_state_dict(path, within="model")``, only the keys that begin
    with ``vae.`` are used. Errors: as for `load_exactly`.
    """
    with torch.device("meta"):
        model = CausalVideoVAE.from_config(config)
    own = {key: x for key, x in state.items() if key.startswith("vae.")}
    load_exactly(model, own or state, prefix="vae.")
    return model


def load_pretrained_vae(folder: str | Path) -> CausalVideoVAE:
    """The VAE in a folder with config.json and weights, such as the released causal_video_vae."""
    return load_vae(*read_folder(folder, within="model"))
