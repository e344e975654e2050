"""Loads official checkpoints, whose keys have to be exactly those of our modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vidgen.common.checkpoint import load_exactly, read_folder
from vidgen.ops import EAGER, Ops

from .config import NovaConfig
from .transformer import NovaTransformer


def load_transformer(
    config: NovaConfig | Mapping[str, Any], state: Mapping[str, Tensor], ops: Ops = EAGER
) -> NovaTransformer:
    """The transformer of a config.json with the weights of a checkpoint, in their dtype.

    Errors: `load_exactly`.
    """
    config = config if isinstance(config, NovaConfig) else NovaConfig.from_dict(config)
    with torch.device("meta"):
        model = NovaTransformer(config, ops)
    load_exactly(model, state)
    return model


def load_pretrained(
    folder: str | Path,
    ops: Ops = EAGER,
    *,
    size: tuple[int, int] | None = None,
    **options: Any,
) -> NovaTransformer:
    """The transformer in a folder with config.json and weights, such as the released variants.

    Args:
        size: height and width of the frames in pixels; default those of training.
        options: replace those of config.json, for example ``spatial_attention="set_causal"``.
    """
    raw, state = read_folder(folder)
    config = replace(NovaConfig.from_dict(raw), **options)
    return load_transformer(config.resized(*size) if size else config, state, ops)
