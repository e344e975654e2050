"""RepVideo, and CogVideoX, which it is without its feature cache: steps and videos.

A step of training returns the loss, an evaluation the velocity for a prompt and for the empty one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.models.case import SAMPLING, ModelStep, Sampler, TokenStep
from vidgen.ops import EAGER
from vidgen.repvideo.checks.example import (
    N_STEPS,
    SIZES,
    EvaluationExample,
    TrainingExample,
    VideoExample,
    evaluation_example,
    example_config,
    example_model,
    training_example,
    video_example,
)
from vidgen.repvideo.model.config import PRESETS
from vidgen.repvideo.model.transformer import CogVideoXTransformer
from vidgen.shapes import Direction

REDUCED, TOY = (2, 3), (1, 3)  # heads and layers; the third is the first that mixes


@dataclass(frozen=True)
class RepVideoStep(ModelStep):
    preset: str = "2b"
    size: str = "480p"  # of `SIZES`
    less: tuple[int, int] | tuple[()] = ()
    gates: bool = True  # False: CogVideoX
    checkpoints: bool = False  # as it was trained: layers run again in the backward

    @property
    def title(self) -> str:
        return f"{'RepVideo' if self.gates else 'CogVideoX'} {self.preset.upper()}"

    @property
    def prefix(self) -> str:
        family = "repvideo" if self.gates else "cogvideox"
        return f"cpu_{family}" if self.less == REDUCED else f"{family}_{self.preset}"

    def model(self, device: torch.device, dtype: torch.dtype) -> CogVideoXTransformer:
        config = example_config(self.preset, *self.less, gates=self.gates)
        model = example_model(config, EAGER, device=device, dtype=dtype)
        model.gradient_checkpointing = self.checkpoints
        return model

    def video_tokens(self, rows: int) -> int:
        n_frames, height, width = SIZES[self.size].latents
        patch = PRESETS[self.preset].patch_size
        return rows * n_frames * (height // patch) * (width // patch)


@dataclass(frozen=True)
class RepVideoTraining(RepVideoStep, TokenStep):
    @property
    def name(self) -> str:
        return f"{self.prefix}_train_{self.size}"

    @property
    def n_tokens(self) -> int:
        return self.video_tokens(rows=1)

    def example(self, model: CogVideoXTransformer) -> TrainingExample:
        return training_example(model, size=self.size)


@dataclass(frozen=True)
class RepVideoEvaluation(RepVideoStep, TokenStep):
    @property
    def name(self) -> str:
        return f"{self.prefix}_{self.size}"

    @property
    def n_tokens(self) -> int:
        return self.video_tokens(rows=2)

    @property
    def directions(self) -> tuple[Direction, ...]:
        return SAMPLING

    def example(self, model: CogVideoXTransformer) -> EvaluationExample:
        return evaluation_example(model, size=self.size)


@dataclass(frozen=True)
class RepVideoVideo(RepVideoStep, Sampler):
    """The first steps of sampling; all of them cost the same."""

    n_steps: int = 2

    @property
    def name(self) -> str:
        return f"{self.prefix}_video_{self.size}"

    @property
    def measured_share(self) -> float:
        return self.n_steps / N_STEPS

    def example(self, model: CogVideoXTransformer) -> VideoExample:
        return video_example(model, size=self.size, n_steps=self.n_steps)


TRAININGS = tuple(RepVideoTraining(gates=gates, checkpoints=True) for gates in (True, False))
EVALUATIONS = tuple(
    RepVideoEvaluation(preset, gates=gates) for preset in ("2b", "5b") for gates in (True, False)
)
REDUCED_STEPS = (
    RepVideoTraining("2b", "480p_short", REDUCED),
    *(RepVideoEvaluation("2b", "480p_short", REDUCED, gates=gates) for gates in (True, False)),
)
TOY_STEPS = (
    RepVideoTraining("2b", "toy", TOY, checkpoints=True),
    RepVideoEvaluation("5b", "toy", TOY),
    RepVideoEvaluation("2b", "toy", TOY, gates=False),
)
VIDEOS = (RepVideoVideo(),)
REDUCED_VIDEOS = (RepVideoVideo("2b", "480p_short", REDUCED),)
TOY_VIDEOS = (RepVideoVideo("2b", "toy", TOY, n_steps=3),)
