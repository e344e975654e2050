"""Classifier-free guidance: how strongly each unit of a video is led away from the negative prompt.

    v = v_negative + g (v_prompt - v_negative)

as in arXiv 2207.12598, with g of its own for the first unit, an image, and for all later ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LinearGuidance:
    """``g = max(guidance.image - slope * unit, minimum)``, by the defaults of the released code."""

    slope: float = 0.5
    minimum: float = 2.0

    def __post_init__(self) -> None:
        _check_finite(slope=self.slope, minimum=self.minimum)


@dataclass(frozen=True)
class Guidance:
    """Scales of guidance; 1 is the prompt alone, and its forward passes are half as large.

    The released code turns guidance off by an image scale of 0 or less, and so does this.
    """

    image: float = 7.0  # of the first unit
    video: float = 5.0  # of all others; the released code takes 4 where it continues an image
    linear: LinearGuidance | None = None  # takes the place of both
    always: bool = False  # both prompts also where the scale is 1, as the released code runs

    def __post_init__(self) -> None:
        _check_finite(image=self.image, video=self.video)

    def scale(self, unit: int) -> float:
        """g of a unit."""
        if self.is_off:
            return 1.0
        if self.linear is not None:
            return max(self.image - self.linear.slope * unit, self.linear.minimum)
        return self.video if unit else self.image

    def is_active(self, unit: int) -> bool:
        """Whether a unit needs the negative prompt."""
        return self.scale(unit) != 1.0 or (self.always and not self.is_off)

    @property
    def is_off(self) -> bool:
        return self.linear is None and self.image <= 0


def _check_finite(**scales: float) -> None:
    for name, x in scales.items():
        if not math.isfinite(x):
            raise ValueError(f"{name} guidance: expected a finite number, got {x}")
