"""The options of the sampler: size and units of a video, steps, guidance, cache."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..model.config import PATCH
from ..model.history import HistoryClip, history_layout, unit_frames
from ..model.kv_cache import OFF, CachePolicy
from ..model.positions import Column
from .guidance import Guidance
from .scheduler import PyramidFlowScheduler


@dataclass(frozen=True)
class SamplingConfig:
    """The options of `sampler.sample`; the defaults are those of the released demos.

    Raises:
        ValueError: sizes, steps or counts that do not fit.
    """

    size: tuple[int, int]  # height and width of the latents, an eighth of the pixels
    n_units: int = 1  # of the whole video, including given ones; 1: an image
    frames_per_unit: int = 1  # latent frames; the first unit has one
    first_steps: tuple[int, ...] = (20, 20, 20)  # of the first unit, for each stage
    steps: tuple[int, ...] = (10, 10, 10)  # of every other unit
    guidance: Guidance = field(default_factory=Guidance)
    scheduler: PyramidFlowScheduler = field(default_factory=PyramidFlowScheduler)
    cache: CachePolicy = OFF
    round_official: bool = False  # latents in the model's dtype, not in fp32

    def __post_init__(self) -> None:
        n_stages = self.scheduler.stages
        multiple = PATCH * 2 ** (n_stages - 1)
        if len(self.size) != 2 or any(side < 1 or side % multiple for side in self.size):
            raise ValueError(
                f"size: expected a height and a width that are multiples of {multiple} latents, "
                f"got {list(self.size)}"
            )
        for name, steps in (("first_steps", self.first_steps), ("steps", self.steps)):
            if len(steps) != n_stages or min(steps) < 1:
                expected = f"expected at least 1 step for each of {n_stages} stages"
                raise ValueError(f"{name}: {expected}, got {list(steps)}")
        for name in ("n_units", "frames_per_unit"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")

    @property
    def n_frames(self) -> int:
        """Latent frames of the whole video."""
        return unit_frames(self.n_units - 1, self.frames_per_unit).stop

    def frame_size(self, level: int) -> tuple[int, int]:
        """Height and width of a frame's latents at a level of the pyramid, 0 the lowest."""
        factor = 2 ** (self.scheduler.stages - 1 - level)
        return self.size[0] // factor, self.size[1] // factor

    def clips(self, unit: int, stage: int) -> list[HistoryClip]:
        """The clips that the model sees at a stage of ``unit``; the last one is being made."""
        per_unit = self.frames_per_unit
        history = history_layout(unit, stage, per_unit)
        return [*history, HistoryClip(stage, unit_frames(unit, per_unit))]

    def column(self, unit: int, stage: int) -> Column:
        """The sizes of `clips` in tokens."""
        sizes = [(clip, self.frame_size(clip.level)) for clip in self.clips(unit, stage)]
        return tuple((len(clip.frames), h // PATCH, w // PATCH) for clip, (h, w) in sizes)
