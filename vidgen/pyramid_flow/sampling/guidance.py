"""Classifier-free guidance (arXiv 2207.12598): its scale g for each unit of a video.

    v = v_negative + g (v_prompt - v_negative)

The first unit, an image, and all later units have different scales.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LinearGuidance:
    """``g = max(guidance.image - slope * unit, minimum)``, with the released code's defaults."""

    slope: float = 0.5
    minimum: float = 2.0

    def __post_init__(self) -> None:
        _check_finite(slope=self.slope, minimum=self.minimum)


@dataclass(frozen=True)
class Guidance:
    """Scales of guidance. A scale of 1 is no guidance; its forward passes are half as large.

    As in the released code, an image scale of 0 or less turns guidance off for all units.
    """

    image: float = 7.0  # of the first unit
    video: float = 5.0  # of every other unit; the released code uses 4 to continue an image
    linear: LinearGuidance | None = None  # if given, the scales of all units
    always: bool = False  # run both prompts even at scale 1, as the released code does

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
