"""Loads the transformers from official checkpoints, whose keys must fit exactly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidgen.common.checkpoint import load_exactly, read_folder
from vidgen.ops import EAGER, Ops

from .config import FluxConfig, MMDiTConfig, is_flux
from .flux import PyramidFluxTransformer
from .mmdit import PyramidDiffusionMMDiT
from .transformer import PyramidTransformer


def build_transformer(config: Mapping[str, Any], ops: Ops = EAGER) -> PyramidTransformer:
    """The transformer of a config.json, freshly initialised."""
    if is_flux(config):
        return PyramidFluxTransformer(FluxConfig.from_dict(config), ops)
    return PyramidDiffusionMMDiT(MMDiTConfig.from_dict(config), ops)


def load_transformer(
    config: Mapping[str, Any], state: Mapping[str, Tensor], ops: Ops = EAGER
) -> PyramidTransformer:
    """The transformer of a config.json with the weights of a checkpoint, in their dtype.

    In training checkpoints keys begin with ``dit.``, and those of VAE and text encoders are
    skipped. Errors: as for `load_exactly`.
    """
    with torch.device("meta"):
        model = build_transformer(config, ops)
    load_exactly(model, state, prefix="dit.", skip=("vae", "text_encoder"))
    return model


def load_pretrained(folder: str | Path, ops: Ops = EAGER, **options: Any) -> PyramidTransformer:
    """The transformer in a folder with config.json and weights, such as the released variants.

    ``options`` replace those of config.json, for example ``use_gradient_checkpointing=True``.
    """
    config, state = read_folder(folder, within="model")
    return load_transformer(config | options, state, ops)
