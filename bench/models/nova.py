"""NOVA: steps of training, its temporal and spatial passes, the denoising of a set, whole videos.

The released code does more than is needed, such as denoising whole latents where the tokens of one
set are enough. Eager PyTorch runs in its way and ours in the shorter one, to the same results.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from bench.models.case import SAMPLING, ModelStep, Run, Sampler, TokenStep, Way
from vidgen.nova.checks import example as examples
from vidgen.nova.checks.example import CONFIGS, GUIDANCE, SetOfFrame, example_model
from vidgen.nova.model.transformer import NovaTransformer
from vidgen.nova.sampling.sampler import SamplingConfig
from vidgen.ops import EAGER
from vidgen.shapes import Direction

TITLES = {"480p": "NOVA 0.6B", "480p_narrow": "NOVA, width 256", "toy": "NOVA, width 32"}
REDUCED = "480p_narrow"
CLIP_FRAMES = 9  # latent frames of a released video


@dataclass(frozen=True)
class NovaStep(ModelStep):
    size: str = "480p"  # of `CONFIGS`

    @property
    def title(self) -> str:
        return TITLES[self.size]

    def named(self, what: str) -> str:
        return f"cpu_nova_{what}" if self.size == REDUCED else f"nova_{what}_{self.size}"

    def model(self, device: torch.device, dtype: torch.dtype) -> NovaTransformer:
        return example_model(CONFIGS[self.size], EAGER, device=device, dtype=dtype)

    def prepare(self, example: Any, model: nn.Module, way: Way) -> Run:
        order = "official" if way == "released" else "sorted"
        return lambda model: example(model, order)


@dataclass(frozen=True)
class NovaTraining(NovaStep, TokenStep):
    """A step of training; ``temporal``: the pass of the video encoder alone."""

    temporal: bool = False
    rows: int = 3
    n_frames: int = CLIP_FRAMES

    @property
    def name(self) -> str:
        return self.named("temporal_pass" if self.temporal else "train")

    @property
    def n_tokens(self) -> int:
        config = CONFIGS[self.size]
        n_tokens = config.n_video_tokens if self.temporal else config.n_tokens
        return self.rows * self.n_frames * n_tokens

    def example(self, model: NovaTransformer) -> Any:
        make = examples.temporal_example if self.temporal else examples.training_example
        return make(model, rows=self.rows, n_frames=self.n_frames)

    def prepare(self, example: Any, model: nn.Module, way: Way) -> Run:
        return example if self.temporal else super().prepare(example, model, way)


@dataclass(frozen=True)
class NovaSet(NovaStep, TokenStep):
    """One set of a frame: the image encoder (spatial), or the whole loop of diffusion steps."""

    part: Literal["spatial", "denoising"] = "spatial"

    @property
    def name(self) -> str:
        return self.named(f"{self.part}_set")

    @property
    def n_tokens(self) -> int:
        n_tokens = CONFIGS[self.size].n_tokens
        if self.part == "denoising":
            some = SetOfFrame.middle(n_tokens)
            n_tokens = some.last - some.first
        return GUIDANCE.n_branches * n_tokens

    @property
    def directions(self) -> tuple[Direction, ...]:
        return SAMPLING

    def example(self, model: NovaTransformer) -> Any:
        make: Callable[..., Any] = examples.spatial_example
        return (examples.denoising_example if self.part == "denoising" else make)(model)

    def prepare(self, example: Any, model: nn.Module, way: Way) -> Run:
        assert isinstance(model, NovaTransformer)
        return example.prepared(model, "official" if way == "released" else "sorted")


@dataclass(frozen=True)
class NovaVideo(NovaStep, Sampler):
    """The first frames of a video; the cost of frames differs by 0.2 %, the temporal pass."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)  # of the measured frames
    clip_frames: int = CLIP_FRAMES

    @property
    def name(self) -> str:
        return self.named("video")

    @property
    def measured_share(self) -> float:
        return self.sampling.max_latent_length / self.clip_frames

    def example(self, model: NovaTransformer) -> Any:
        return examples.frames_example(model, self.sampling)


TRAININGS = (NovaTraining(), NovaTraining(temporal=True))
EVALUATIONS = (NovaSet(), NovaSet(part="denoising"))
REDUCED_STEPS = (
    NovaTraining(REDUCED, rows=1, n_frames=1),
    NovaTraining(REDUCED, temporal=True, rows=1, n_frames=5),
    NovaSet(REDUCED),
    NovaSet(REDUCED, "denoising"),
)
TOY_STEPS = (
    NovaTraining("toy", rows=2, n_frames=3),
    NovaTraining("toy", temporal=True, rows=2, n_frames=3),
    NovaSet("toy"),
    NovaSet("toy", "denoising"),
)
VIDEOS = (NovaVideo(),)
REDUCED_VIDEOS = (NovaVideo(REDUCED, SamplingConfig(4, 10)),)
TOY_VIDEOS = (NovaVideo("toy", SamplingConfig(3, 4, max_latent_length=2), clip_frames=2),)
