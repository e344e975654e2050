"""Weights of a model that is run for its time or its shapes: none is 0, as in a fresh one."""

import torch
from torch import nn


def draw_weights(model: nn.Module, seed: int) -> None:
    """Matrices become normal, of a variance of one over the elements of a row; vectors stay.

    Drawn on the device of the model: on another one the same seed gives other weights.
    """
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                spread = parameter[0].numel() ** -0.5
                parameter.normal_(0.0, spread, generator=generator)
