"""Official checkpoints: state dicts by key, with nothing missing and nothing left over."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vidgen.ops import EAGER, Ops

from .config import FluxConfig, MMDiTConfig, is_flux
from .flux import PyramidFluxTransformer
from .mmdit import PyramidDiffusionMMDiT
from .transformer import PyramidTransformer
from .vae import CausalVideoVAE

FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
SHOWN = 5  # keys named in an error


def read_state_dict(path: str | Path, within: str | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors or torch file.

    Args:
        within: the entry of a training checkpoint that holds them, used where there is one.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    return state[within] if within is not None and within in state else state


def load_exactly(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    prefix: str = "",
    skip: Sequence[str] = (),
) -> None:
    """Loads ``state`` into ``model``.

    Args:
        prefix: removed from the keys that have it.
        skip: beginnings of keys that belong to other models and are left out.

    Raises:
        ValueError: keys missing or left over, other shapes.
    """
    found = {
        key.removeprefix(prefix): x for key, x in state.items() if not key.startswith(tuple(skip))
    }
    expected = model.state_dict()
    for problem, keys in (
        ("missing", expected.keys() - found.keys()),
        ("left over", found.keys() - expected.keys()),
    ):
        if keys:
            names = ", ".join(sorted(keys)[:SHOWN])
            more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
            raise ValueError(
                f"checkpoint: expected the {len(expected)} keys of {type(model).__name__}, "
                f"got {len(keys)} {problem}: {names}{more}"
            )
    for key, x in expected.items():
        if found[key].shape != x.shape:
            raise ValueError(
                f"checkpoint: expected {key} of shape {list(x.shape)}, "
                f"got {list(found[key].shape)}; is config.json of another size?"
            )
    model.load_state_dict(found, assign=any(x.is_meta for x in expected.values()))


def build_transformer(config: Mapping[str, Any], ops: Ops = EAGER) -> PyramidTransformer:
    """The transformer of a config.json, freshly initialised."""
    if is_flux(config):
        return PyramidFluxTransformer(FluxConfig.from_dict(config), ops)
    return PyramidDiffusionMMDiT(MMDiTConfig.from_dict(config), ops)


def load_transformer(
    config: Mapping[str, Any], state: Mapping[str, Tensor], ops: Ops = EAGER
) -> PyramidTransformer:
    """The transformer of a config.json with the weights of a checkpoint, in their dtype.

    Keys may begin with ``dit.``, as in training checkpoints, whose VAE and text encoders are left
    out. Errors: `load_exactly`.
    """
    with torch.device("meta"):
        model = build_transformer(config, ops)
    load_exactly(model, state, prefix="dit.", skip=("vae", "text_encoder"))
    return model


def load_pretrained(folder: str | Path, ops: Ops = EAGER, **options: Any) -> PyramidTransformer:
    """The transformer in a folder with config.json and weights, such as the released variants.

    ``options`` replace those of config.json: ``use_gradient_checkpointing=True`` to train.
    """
    config, state = _read_folder(folder)
    return load_transformer(config | options, state, ops)


def load_vae(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> CausalVideoVAE:
    """The VAE of a config.json with the weights of a checkpoint, in their dtype.

    Of a training checkpoint, ``read_state_dict(path, within="model")``, the keys that begin with
    ``vae.`` are taken, and those of its losses left out. Errors: `load_exactly`.
    """
    with torch.device("meta"):
        model = CausalVideoVAE.from_config(config)
    own = {key: x for key, x in state.items() if key.startswith("vae.")}
    load_exactly(model, own or state, prefix="vae.")
    return model


def load_pretrained_vae(folder: str | Path) -> CausalVideoVAE:
    """The VAE in a folder with config.json and weights, such as the released causal_video_vae."""
    return load_vae(*_read_folder(folder))


def _read_folder(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and state dict."""
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise ValueError(f"folder: expected config.json in {folder}, found none")
    config = json.loads((folder / "config.json").read_text())
    path = next((folder / name for name in FILES if (folder / name).exists()), None)
    if path is None:
        raise ValueError(f"folder: expected {' or '.join(FILES)} in {folder}, found neither")
    return config, read_state_dict(path, within="model")
