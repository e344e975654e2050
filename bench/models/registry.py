"""`STEPS` of all models, and their samplers (`VIDEOS`), by set of shapes."""

from __future__ import annotations

from bench.models import nova, pyramid_flow, repvideo
from bench.models.case import ModelStep

FAMILIES = (pyramid_flow, repvideo, nova)

# The most important first, as a run may be cut short.
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
