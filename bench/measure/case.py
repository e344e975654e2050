"""`Case`: what measuring needs of a call, whichever operator it is of; how errors are counted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

Function = Callable[..., Tensor | tuple[Tensor, ...]]  # takes the differentiable inputs

# Largest error relative to the largest reference value. A wrong mask changes results by 1e-1 and
# more. TF32 changes them by 3e-4, which does not pass as fp32. The 16-bit limits are four roundings
# of the probabilities.
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 5e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}


class Case(Protocol):
    """A call with real tensors, and the reference that every provider is compared with."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def leaves(self) -> Sequence[Tensor]:
        """The inputs that are differentiated; a provider's function takes them in this order."""
        ...

    def upstream(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The incoming gradients for timing a backward: one for each output, in its dtype."""
        ...

    def allowed(self, backward: bool) -> float:
        """The largest disagreement that counts as rounding."""
        ...

    def disagreement(self, function: Function, backward: bool) -> float:
        """Largest error of outputs (and gradients), in units of the reference's largest value."""
        ...


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest error in units of the largest expected value."""
    if not expected.numel():
        return 0.0
    error = float((actual.double() - expected).abs().max())
    largest = float(expected.abs().max())
    return error / largest if largest else error


def worst(errors: Iterable[float]) -> float:
    """The largest error; NaN is larger than any number."""
    return max(errors, key=lambda e: math.inf if math.isnan(e) else e)


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
