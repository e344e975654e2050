"""The registry: steps of all models, and their samplers."""

from __future__ import annotations

from bench.models import nova, pyramid_flow, repvideo
from bench.models.case import ModelStep

FAMILIES = (pyramid_flow, repvideo, nova)

# The most telling first: a run that is cut short has measured those.
STEPS: dict[str, tuple[ModelStep, ...]] = {
    "real": (
        *(step for family in FAMILIES for step in family.TRAININGS),
        *(step for family in FAMILIES for step in family.EVALUATIONS),
    ),
    "reduced": tuple(step for family in FAMILIES for step in family.REDUCED_STEPS),
    "toy": tuple(step for family in FAMILIES for step in family.TOY_STEPS),
}
VIDEOS: dict[str, tuple[ModelStep, ...]] = {
    "real": tuple(video for family in FAMILIES for video in family.VIDEOS),
    "reduced": tuple(video for family in FAMILIES for video in family.REDUCED_VIDEOS),
    "toy": tuple(video for family in FAMILIES for video in family.TOY_VIDEOS),
}
