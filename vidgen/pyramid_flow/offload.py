"""Lets models take turns on a device that cannot hold all of them. The pipeline uses it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Placement:
    """The device of the models, and whether they stay on it.

    Usually a model is moved to the device when it is first used, and stays there. With
    ``low_memory`` its weights stay on the CPU and are copied to the device for each use. The copy
    is dropped afterwards: inference changes no weights. If the device is the CPU, nothing is
    copied.
    """

    device: torch.device | str = "cpu"
    low_memory: bool = False

    @contextmanager
    def use(self, model: nn.Module) -> Iterator[None]:
        """``model`` is on the device inside the context."""
        if not self.low_memory:
            model.to(self.device)
            yield
            return
        home = [(x, x.data) for x in chain(model.parameters(), model.buffers())]
        try:
            for x, data in home:
                x.data = _to_device(data, self.device)
            yield
        finally:
            for x, data in home:
                x.data = data


def _to_device(x: Tensor, device: torch.device | str) -> Tensor:
    return x.to(device)
