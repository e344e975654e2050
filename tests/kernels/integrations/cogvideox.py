"""Tiny CogVideoX of diffusers for tests of the drop-in, and what shows whether one was changed."""

from collections.abc import Callable
from types import MethodType
from typing import Any

import accelerate.hooks
import pytest
import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
)
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 12,
    "num_layers": 4,
    "sample_width": 6,
    "sample_height": 4,
    "sample_frames": 9,
    "max_text_seq_length": 8,
}
GATE_VALUES = [0.3, -0.2, 1.3, 0.6]

portable_only = pytest.mark.portable_only
every_position = pytest.mark.parametrize("rope", [False, True], ids=["sincos", "rope"])
with_and_without_gates = pytest.mark.parametrize(
    "gates", [None, GATE_VALUES], ids=["plain", "gates"]
)


CACHES: dict[str, Callable[[], Any]] = {
    "first_block": lambda: FirstBlockCacheConfig(threshold=1e6),
    "pyramid_attention": lambda: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    ),
}


def tiny(rope: bool = False, **sizes) -> Any:
    """No weight is 0 or 1, so that none may be forgotten."""
    options = {**SIZES, "use_rotary_positional_embeddings": rope, **sizes}
    model = CogVideoXTransformer3DModel(**options).eval()
    with torch.no_grad():
        for name, x in model.named_parameters():
            is_scale = x.ndim == 1 and name.endswith("weight")
            x.normal_(float(is_scale), 0.1 if x.ndim == 1 else x[0].numel() ** -0.5)
    return model


def tables(theta: int = 10000) -> Any:
    """Cosines and sines [18, 16], as the pipeline makes them."""
    return get_3d_rotary_pos_embed(16, ((0, 0), (2, 3)), (2, 3), 3, theta=theta)


def inputs(rope: bool = False, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Two samples of three latent frames."""
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 3, 4, 4, 6, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(2, 8, 12, generator=generator).to(dtype),
        "timestep": torch.tensor([900, 20]),
        "image_rotary_emb": tables() if rope else None,
        "return_dict": False,
    }


def output(model: Any, given: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**given)[0]


def gradients(model: Any, given: dict[str, Any]) -> list[Tensor]:
    """Of everything that asks for one."""
    leaves = [x for x in model.parameters() if x.requires_grad]
    return list(torch.autograd.grad(model(**given)[0].square().sum(), leaves))


def trained_gates() -> nn.Parameter:
    return nn.Parameter(torch.tensor(GATE_VALUES))


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Relative to the largest value, as gradients of different weights differ in size."""
    assert actual.shape == expected.shape
    difference = (actual - expected).abs().max().item()
    assert difference <= tolerance * max(1.0, expected.abs().max().item())


def two_steps(model: Any, given: dict[str, Any]) -> list[Tensor]:
    """The second one may reuse what the first has left."""
    later = {**given, "hidden_states": 0.9 * given["hidden_states"]}
    found = []
    for step in (given, later):
        with model.cache_context("cond"):
            found.append(output(model, step))
    return found


class Operators(TorchDispatchMode):
    """Counts the operators that run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


class Shifted(accelerate.hooks.ModelHook):
    """accelerate's."""

    def post_forward(self, module: nn.Module, output: tuple) -> tuple:
        return tuple(x + 0.25 for x in output)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """What a model consists of: weights, attributes of its modules, processors."""
    state: dict[str, Any] = {
        f"{name}.{key}": x if key != "_modules" else list(x)
        for name, module in model.named_modules()
        for key, x in vars(module).items()
    }
    state |= {f"parameter {name}": x for name, x in model.named_parameters()}
    state |= {f"hooks of {name}": list(m._forward_hooks) for name, m in model.named_modules()}
    return state


def assert_same(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    assert list(after) == list(before)
    for name, x in before.items():
        is_value = isinstance(x, (list, dict, set, int, float, str, MethodType))
        assert after[name] is x or (is_value and after[name] == x), name
