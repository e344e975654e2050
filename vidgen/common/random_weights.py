"""Models with random weights, for `--random-weights`, benchmarks and tests."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def fresh(build: Callable[[], Model], seed: int) -> Model:
    """A model with the initial weights that ``build`` draws with this seed.

    PyTorch's global random state is restored afterwards.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def with_drawn_weights(
    build: Callable[[], Model],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Model:
    """The model of ``build`` with `draw_weights`: for benchmarks, where no layer should give 0."""
    with torch.device(device):
        model = build().to(dtype)
    draw_weights(model, seed)
    return model


def draw_weights(model: nn.Module, seed: int) -> None:
    """Draws all matrices anew, also those that are 0 in a fresh model; vectors stay.

    Elements are normal, with a variance of 1 / (elements of a row). They are drawn on the device
    of the model: on another device the same seed gives other weights.
    """
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                spread = parameter[0].numel() ** -0.5
                parameter.normal_(0.0, spread, generator=generator)
