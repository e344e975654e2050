"""Loads checkpoints of CogVideoX and RepVideo, whose keys have to be exactly those of the model.

Both layouts are read: SwissArmyTransformer (SAT), in which RepVideo is released, and diffusers.
`keys` has the names.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidgen.common.checkpoint import (
    load_exactly,
    read_folder,
    read_state_dict,
    without_common_prefix,
)
from vidgen.ops import EAGER, Ops

from .config import OUT_NORM_EPS, CogVideoXConfig
from .keys import GATES, SAT_GATES, SAT_PREFIX, SAT_TABLE, SAT_UNUSED, to_diffusers
from .positions import sincos_table
from .transformer import CogVideoXTransformer

SAT_FILE = "mp_rank_00_model_states.pt"
TABLE_ERROR = 1e-6  # allowed difference of SAT's position table from ours, in fp32


def load_transformer(
    config: CogVideoXConfig, state: Mapping[str, Tensor], ops: Ops = EAGER
) -> CogVideoXTransformer:
    """The transformer with the weights of a checkpoint, in their dtype.

    ``state`` has the names of SAT, with or without prefix, or those of diffusers. SAT files from
    training also hold the VAE and the text encoder, which are ignored.

    If ``config.gates`` is set but the checkpoint has none (plain CogVideoX), the gates become 0,
    which does not change results, and a warning is given.

    Raises:
        ValueError: missing or unknown keys, other shapes, or a table of positions that does not
            fit the sizes in ``config``.
    """
    state = {k: x for k, x in transformer_weights(state).items() if k not in SAT_UNUSED}
    if (table := state.pop(SAT_TABLE, None)) is not None:
        _check_table(config, table)
    with torch.device("meta"):
        model = CogVideoXTransformer(config, ops)
    expected = model.state_dict().keys()
    state = without_common_prefix(to_diffusers(state), expected)
    if expected - state.keys() == {GATES}:
        warnings.warn(
            f"the checkpoint has no {GATES}: plain CogVideoX, all gates are set to 0", stacklevel=2
        )
        like = next(iter(state.values()))
        state[GATES] = like.new_zeros(config.num_layers)
    load_exactly(model, state)
    return model


def load_pretrained(folder: str | Path, ops: Ops = EAGER, **options: Any) -> CogVideoXTransformer:
    """The transformer in a folder of SAT, of diffusers, or of a pipeline of diffusers.

    Args:
        options: replace those of config.json; for a SAT folder, which has none, those that
            `config_of` finds, such as the sizes of videos.
    """
    config, state = read_pretrained(folder, **options)
    return load_transformer(config, state, ops)


def read_pretrained(
    folder: str | Path, **options: Any
) -> tuple[CogVideoXConfig, dict[str, Tensor]]:
    """Config and state dict of a folder; arguments as in `load_pretrained`."""
    folder = Path(folder)
    if is_sat_folder(folder):
        state = read_sat(folder)
        return config_of(state, **options), state
    if (folder / "transformer").is_dir():
        folder = folder / "transformer"
    config, state = read_folder(folder)
    has_gates = any(key.split(".")[-1] == GATES for key in state)  # whatever the prefix
    return CogVideoXConfig.from_dict({"gates": has_gates, **config, **options}), state


def is_sat_folder(folder: str | Path) -> bool:
    """Whether a folder has SAT's layout. ValueError if only its file ``latest`` is missing."""
    folder = Path(folder)
    if (folder / "latest").exists():
        return True
    if found := sorted(path.parent.name for path in folder.glob(f"*/{SAT_FILE}")):
        raise ValueError(
            f"folder: expected a file named latest in {folder}, found none: write the name of the "
            f"folder with the weights into it ({', '.join(found)})"
        )
    return False


def read_sat(folder: str | Path) -> dict[str, Tensor]:
    """The transformer's weights in a SAT folder, with SAT's names without prefix.

    The file ``latest`` names the subfolder with the weights.

    Raises:
        ValueError: missing files.
    """
    folder = Path(folder)
    if not is_sat_folder(folder):
        raise ValueError(f"folder: expected a file named latest in {folder}, found none")
    path = folder / (folder / "latest").read_text().strip() / SAT_FILE
    if not path.exists():
        raise ValueError(f"folder: expected {path}, which {folder / 'latest'} names, found none")
    return transformer_weights(read_state_dict(path, within="module"))


def transformer_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Removes the prefix; if any key has it, keys without it belong to other models and go."""
    own = [key for key in state if key.startswith(SAT_PREFIX)]
    return {key.removeprefix(SAT_PREFIX): state[key] for key in own or state}


def config_of(state: Mapping[str, Tensor], **options: Any) -> CogVideoXConfig:
    """The config of a SAT state dict, from its shapes and keys; the rest as in CogVideoX-2B.

    Args:
        options: replace what is found; weights do not tell the sizes of videos, for example.
    """

    def shape(name: str) -> torch.Size:
        if name not in state:
            raise ValueError(f"checkpoint: expected {name}, found none; is it of SAT?")
        return state[name].shape

    patch = shape("mixins.patch_embed.proj.weight")
    head_dim = shape("mixins.adaln_layer.query_layernorm_list.0.weight")[0]
    n_time, width = shape("time_embed.0.weight")
    n_patch = CogVideoXConfig.patch_size**2
    found: dict[str, Any] = {
        "num_attention_heads": width // head_dim,
        "attention_head_dim": head_dim,
        "time_embed_dim": n_time,
        "text_embed_dim": shape("mixins.patch_embed.text_proj.weight")[1],
        "num_layers": len([key for key in state if key.endswith(".input_layernorm.weight")]),
        "patch_bias": "mixins.patch_embed.proj.bias" in state,
        "use_rotary_positional_embeddings": any(key in state for key in SAT_UNUSED),
        "gates": SAT_GATES in state,
        "out_norm_eps": OUT_NORM_EPS,
    }
    if "ofs_embed.0.weight" in state:
        found["ofs_embed_dim"] = shape("ofs_embed.0.weight")[1]
    if len(patch) == 2:  # 1.5: two frames in a patch, and no convolution
        n_patch *= 2
        found |= {"patch_size_t": 2, "patch_bias": False, "use_rotary_positional_embeddings": True}
        found["in_channels"] = patch[1] // n_patch
    else:
        found["in_channels"] = patch[1]
    found["out_channels"] = shape("mixins.final_layer.linear.weight")[0] // n_patch
    return CogVideoXConfig(**{**found, **options})


def _check_table(config: CogVideoXConfig, table: Tensor) -> None:
    """Raises ValueError unless SAT's position table ``[1, S + T H W, D]`` is the one we compute."""
    patch, patch_t = config.patch_size, config.patch_size_t or 1
    grid = (
        config.sample_latent_frames // patch_t,
        config.sample_height // patch,
        config.sample_width // patch,
    )
    expected = sincos_table(config, grid, table.device)
    expected = F.pad(expected, (0, 0, config.max_text_seq_length, 0))[None]
    if table.shape != expected.shape:
        raise ValueError(
            f"{SAT_TABLE}: expected shape {list(expected.shape)} of the sizes in the config, "
            f"got {list(table.shape)}"
        )
    error = (table.float() - expected).abs().max().item()
    if not error <= max(torch.finfo(table.dtype).eps, TABLE_ERROR):
        raise ValueError(
            f"{SAT_TABLE}: expected the sines and cosines of its positions, got a tensor that "
            f"differs by {error:.1e}"
        )
