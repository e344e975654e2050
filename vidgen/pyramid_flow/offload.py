"""Models that take turns on a device that cannot hold all of them at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Placement:
    """Where models are while they are used.

    Usually a model is moved to the device the first time, and stays. With ``low_memory`` it is at
    home on the CPU and only visits. Its weights go one way: what was on the device is dropped, for
    inference changes nothing. On the CPU there is nowhere to go, so nothing is moved or copied.
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
