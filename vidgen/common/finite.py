"""NaN and infinity: refused where they come in, and named by the step that made them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

HINT = "a model in fp16 overflows above 65504, bf16 and fp32 do not"


def require_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError that names the first tensor with NaN or infinity, and how many it has."""
    for name, x in tensors.items():
        if x.is_floating_point() and not is_finite(x):
            n_bad = x.numel() - int(x.isfinite().sum())
            raise ValueError(
                f"{name}: expected finite numbers, got NaN or infinity in {n_bad} of {x.numel()}"
            )


def is_finite(x: Tensor) -> Tensor:
    """A bool tensor on the device of ``x``, which need not be waited for; one reduction."""
    if not x.numel():
        return torch.ones((), dtype=torch.bool, device=x.device)
    return torch.linalg.vector_norm(x.detach().flatten(), ord=torch.inf).isfinite()


class FiniteSteps:
    """Which of many steps was the first to make numbers that are not finite.

    `note` only starts work on the device; `check` waits for it.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._steps: list[str] = []
        self._finite: list[Tensor] = []

    def note(self, step: str, x: Tensor) -> None:
        self._steps.append(step)
        self._finite.append(is_finite(x))

    def check(self) -> None:
        """Raises ValueError that names the first such step since the last check."""
        steps, finite = self._steps, self._finite
        self._steps, self._finite = [], []
        if not finite:
            return
        for step, is_good in zip(steps, torch.stack(finite).tolist(), strict=True):
            if not is_good:
                raise ValueError(
                    f"{self._what}: expected finite numbers, got NaN or infinity from {step} on; "
                    f"{HINT}"
                )
