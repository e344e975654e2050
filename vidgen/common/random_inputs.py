"""Random inputs of a model, for the example steps that benchmarks, profiles and tests run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class RandomInputs:
    """Normal tensors in the dtype and on the device of a model, from one generator.

    They are drawn in fp32, so that a seed gives the same numbers in every dtype. A model's examples
    add its shapes in a subclass.
    """

    def __init__(self, model: nn.Module, seed: int) -> None:
        parameter = next(model.parameters())
        self.config: Any = model.config
        self.device, self.dtype = parameter.device, parameter.dtype
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        noise = torch.randn(shape, generator=self.generator, device=self.device)
        return noise.to(self.dtype)
