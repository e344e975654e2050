"""RepVideo's feature cache: a list of the outputs in a window, averaged anew in each layer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from vidgen_kernels import Modulation
from vidgen_kernels.feature_cache import Segment

from .norms import gated_residual, norm_modulate


def mix(
    y: Tensor,
    total: Tensor | None,
    gate: Tensor,
    n: int,
    *,
    older: Sequence[Tensor] = (),
    keep_sum: bool = True,
    sum_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, None]:
    """Without a running sum: as in RepVideo's code, the mean of all outputs, also for n = 1."""
    mean = torch.stack([*older, y]).mean(dim=0)
    return gate * mean + (1 - gate) * y, None


def segment(
    x: Tensor,
    f: Tensor | None,
    total: Tensor | None,
    cache_gate: Tensor,
    n: int,
    *,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    text: Modulation | None = None,
    text_length: int = 0,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-5,
    older: Sequence[Tensor] = (),
    keep_sum: bool = True,
    sum_dtype: torch.dtype = torch.float32,
) -> Segment:
    own = Modulation(gate, scale, shift)
    y = gated_residual(x, f, own, text, text_length)
    h, _ = mix(y, total, cache_gate, n, older=older)
    a = norm_modulate(h, own, text, text_length, weight, bias, norm, eps)
    return Segment(h, a, None, y)


class CacheWindow:
    """Keeps the outputs of a window in a list, as RepVideo's code does."""

    def __init__(self, gates: Tensor, window: int = 6) -> None:
        self.gates, self.window = gates, window
        self.reset()

    def reset(self) -> None:
        self._outputs: list[Tensor] = []
        # {y: the outputs before it}, for gradient checkpointing, which runs a layer again
        self._before: Any = None

    def __call__(self, layer: int, y: Tensor) -> Tensor:
        n, older = self._enter(layer, y)
        h, _ = mix(y, None, self.gates[layer], n, older=older)
        self._outputs = [*older, y]
        return h

    def segment(
        self, layer: int, x: Tensor, f: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        n, older = self._enter(layer, x)
        h, a, _, y = segment(x, f, None, self.gates[layer], n, older=older, **options)
        assert y is not None
        self._outputs = [*older, y]
        return h, a

    def _enter(self, layer: int, key: Tensor) -> tuple[int, list[Tensor]]:
        n = 1 if layer == 0 else (layer - 1) % self.window + 1
        if torch.compiler.is_compiling():
            return n, [] if n == 1 else self._outputs
        if self._before is None:
            self._before = WeakTensorKeyDictionary()
        older = [] if n == 1 else self._before.get(key, self._outputs)
        self._before[key] = older
        return n, older
