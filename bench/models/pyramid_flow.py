"""Pyramid Flow: steps of training, evaluations of both transformers, and whole videos.

A step of training makes the columns of the pyramid, runs the model on all of them packed, and
returns the loss. An evaluation returns the velocity of the current frame, for a prompt and for the
empty one; with the cache it is given the keys and values of earlier frames.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bench.models.case import SAMPLING, ModelStep, Run, Sampler, TokenStep, Way
from vidgen.ops import EAGER
from vidgen.pyramid_flow.checks.example import (
    LATENTS,
    SamplingExample,
    TrainingExample,
    VideoExample,
    example_config,
    example_model,
    sampling_example,
    training_example,
    video_example,
)
from vidgen.pyramid_flow.model.history import settled_frames, training_units
from vidgen.pyramid_flow.model.transformer import PyramidTransformer
from vidgen.pyramid_flow.training.loss import TrainingConfig, column_tokens, training_step
from vidgen.shapes import Direction

ModelName = Literal["flux", "mmdit"]
MODELS: tuple[ModelName, ...] = ("flux", "mmdit")
Less = tuple[int, int] | tuple[()]
REDUCED, TOY = (4, 1), (1, 1)  # heads, and layers of a kind


@dataclass(frozen=True)
class PyramidStep(ModelStep):
    """One of the two transformers, as released or with less width and depth."""

    transformer: ModelName
    size: str  # of `LATENTS`
    less: Less = ()

    @property
    def title(self) -> str:
        return "Pyramid Flow miniFLUX" if self.transformer == "flux" else "Pyramid Flow SD3"

    @property
    def prefix(self) -> str:
        return f"{'cpu_' if self.less == REDUCED else ''}{self.transformer}"

    def model(self, device: torch.device, dtype: torch.dtype) -> PyramidTransformer:
        config = example_config(self.transformer, *self.less)
        return example_model(config, EAGER, device=device, dtype=dtype)


@dataclass(frozen=True)
class PyramidTraining(PyramidStep, TokenStep):
    n_frames: int = 16

    @property
    def name(self) -> str:
        return f"{self.prefix}_train_{self.size}"

    @property
    def n_tokens(self) -> int:
        config, sync_group = TrainingConfig(), min(8, self.n_frames)
        units = training_units(config.n_stages, self.n_frames, step=1, sync_group=sync_group)
        counts = (
            column_tokens(*LATENTS[self.size], stage, units[stage], config)
            for stage in config.stages
        )
        return sum(counts)

    def example(self, model: PyramidTransformer) -> TrainingExample:
        return training_example(model, size=self.size, n_frames=self.n_frames)

    def widened(self, example: TrainingExample, dtype: torch.dtype) -> Callable[[Any], Tensor]:
        """The columns of the example, widened too: rounded to 16 bits a timestep would differ."""
        columns, text = super().widened((example.columns(EAGER), example.text), dtype)
        return lambda model: training_step(model, columns, text).loss


@dataclass(frozen=True)
class PyramidEvaluation(PyramidStep, TokenStep):
    unit: int = 15
    stage: int = 2

    @property
    def name(self) -> str:
        return f"{self.prefix}_{self.size}_u{self.unit}_s{self.stage}"

    @property
    def n_tokens(self) -> int:
        size = LATENTS[self.size]
        return 2 * column_tokens(*size, self.stage, self.unit + 1, TrainingConfig())

    @property
    def directions(self) -> tuple[Direction, ...]:
        return SAMPLING

    @property
    def has_cache(self) -> bool:
        return settled_frames(self.unit, self.stage) > 0

    def example(self, model: PyramidTransformer) -> SamplingExample:
        return sampling_example(model, size=self.size, unit=self.unit, stage=self.stage, rows=2)

    def prepare(self, example: Any, model: nn.Module, way: Way) -> Run:
        if way == "released":
            return example
        assert isinstance(model, PyramidTransformer)
        n_past = settled_frames(self.unit, self.stage) if way == "cached" else 0
        return example.as_sampled(model, n_past)


@dataclass(frozen=True)
class PyramidVideo(PyramidStep, Sampler):
    """All units and stages of a video, with one of `full_steps` steps."""

    n_units: int = 16
    full_steps: int = 10  # of a stage; the first unit has more, and hardly any tokens

    @property
    def name(self) -> str:
        return f"{self.prefix}_video_{self.size}_{self.n_units}u"

    @property
    def measured_share(self) -> float:
        return 1 / self.full_steps

    @property
    def has_cache(self) -> bool:
        return True

    def example(self, model: PyramidTransformer) -> VideoExample:
        return video_example(model, size=self.size, n_units=self.n_units)

    def prepare(self, example: Any, model: nn.Module, way: Way) -> Run:
        return lambda model: example(model, cached=way == "cached")


TRAININGS = tuple(PyramidTraining(m, s) for s in ("384p", "768p") for m in MODELS)
EVALUATIONS = tuple(
    PyramidEvaluation(m, size, stage=stage)
    for size in ("768p", "384p")
    for m in MODELS
    for stage in (2, 1, 0)
)
REDUCED_STEPS = (
    *(PyramidTraining(m, "384p", REDUCED) for m in MODELS),
    *(PyramidEvaluation("flux", "384p", REDUCED, stage=stage) for stage in (2, 1)),
)
TOY_STEPS = (
    *(PyramidTraining(m, "toy", TOY, n_frames=3) for m in MODELS),
    *(PyramidEvaluation(m, "toy", TOY, unit=4, stage=1) for m in MODELS),
)
VIDEOS = (
    PyramidVideo("flux", "384p"),
    PyramidVideo("mmdit", "384p"),
    PyramidVideo("flux", "768p"),
)
REDUCED_VIDEOS = (PyramidVideo("flux", "192p", REDUCED, n_units=10),)
TOY_VIDEOS = (PyramidVideo("flux", "toy", TOY, n_units=3, full_steps=1),)
