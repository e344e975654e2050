"""Pyramid Flow's scheduler: noise levels and timesteps of every stage, and the jumps between them.

The noise level sigma goes from 1 (noise) to 0 (clean); stage 0 has the lowest resolution. Stage s
has the window from ``ori_start_sigmas[s]`` to ``end_sigmas[s]`` of a grid of `num_train_timesteps`
levels. Up-sampling at a jump leaves neighbouring pixels correlated. Block noise removes the
correlation and raises the level, so that a stage s > 0 starts at the larger

    start_s = 1 - alpha_s (1 - o),  alpha_s = 1 / (sqrt(1 + 1/gamma) o + 1 - o),  o = ori_start_s

    x <- alpha_s nearest2(x) + beta_s eta,  beta_s = alpha_s o / sqrt(gamma)

where eta has covariance ``(1 + gamma) I - gamma 11^T`` within every 2 x 2 block. Inside a stage, a
local sigma goes from 1 to 0. The timestep given to the model is global: every stage has a share of
the timesteps in proportion to its length ``start_s - end_s``.

The sampler takes its steps from here, training its tables.

Pyramidal Flow Matching (arXiv 2410.05954), section 3.2 and appendix A.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vidgen.ops import EAGER, Ops, renoise_coefficients


class StageSteps(NamedTuple):
    """The inference steps of one stage, float64."""

    timesteps: Tensor  # [N], given to the model
    sigmas: Tensor  # [N + 1], local to the stage, from 1 to 0

    @property
    def steps(self) -> list[float]:
        """``sigma_next - sigma`` of each step."""
        return self.sigmas.diff().tolist()


@dataclass(frozen=True)
class PyramidFlowScheduler:
    """Tables are float64, computed from a float32 grid of noise levels as in the official code.

    Raises:
        ValueError: settings out of range. Methods raise it for a stage that does not exist, or
            less than one step.
    """

    stages: int = 3
    stage_range: tuple[float, ...] = ()  # from noise to clean; default: equal parts
    gamma: float = 1 / 3  # two pixels of a block of noise have correlation -gamma
    shift: float = 1.0
    num_train_timesteps: int = 1000

    def __post_init__(self):
        equal_parts = (s / self.stages for s in range(self.stages + 1)) if self.stages > 0 else ()
        object.__setattr__(self, "stage_range", tuple(self.stage_range or equal_parts))
        if self.num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps: expected >= 1, got {self.num_train_timesteps}")
        if self.stages < 1 or len(self.stage_range) != self.stages + 1:
            expected = f"expected {self.stages + 1} bounds of at least one stage"
            raise ValueError(f"stage_range: {expected}, got {len(self.stage_range)}")
        first = [int(x * self.num_train_timesteps) for x in self.stage_range]
        if first[0] < 0 or first[-1] > self.num_train_timesteps or first != sorted(set(first)):
            expected = "expected bounds that ascend from 0 to 1"
            raise ValueError(f"stage_range: {expected}, got {list(self.stage_range)}")
        if not 0 < self.gamma <= 1 / 3 + 1e-9:  # above, the covariance has a negative eigenvalue
            raise ValueError(f"gamma: expected above 0, at most 1/3, got {self.gamma}")
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift: expected a positive number, got {self.shift}")

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> "PyramidFlowScheduler":
        """From a dict of options, of which others are ignored; ranges give the number of stages."""
        given = {f.name: options[f.name] for f in fields(cls) if f.name in options}
        if "stage_range" in given:
            given.setdefault("stages", len(given["stage_range"]) - 1)
        return cls(**given)

    @cached_property
    def grid(self) -> tuple[np.ndarray, np.ndarray]:
        """Global timesteps and noise levels in float32, from noise to clean.

        In NumPy, whose values can be read also where new tensors are fake.
        """
        n, shift = np.float32(self.num_train_timesteps), np.float32(self.shift)
        sigmas = np.arange(self.num_train_timesteps, 0, -1, dtype=np.float32) / n
        sigmas = shift * sigmas / (1 + np.float32(self.shift - 1) * sigmas)
        return sigmas * n, sigmas

    @cached_property
    def ori_start_sigmas(self) -> list[float]:
        """The noise level at each stage's start, before the correction for up-sampling."""
        return [self._sigma_at(x) for x in self.stage_range[:-1]]

    @cached_property
    def end_sigmas(self) -> list[float]:
        return [self._sigma_at(x) for x in self.stage_range[1:]]

    @cached_property
    def start_sigmas(self) -> list[float]:
        first, *others = self.ori_start_sigmas
        jumps = [renoise_coefficients(o, self.gamma) for o in others]
        return [first, *(1 - alpha * (1 - o) for (alpha, _), o in zip(jumps, others, strict=True))]

    @cached_property
    def timestep_ratios(self) -> list[tuple[float, float]]:
        """Begin and end of each stage, in fractions of the timesteps, from noise to clean."""
        lengths = [a - b for a, b in zip(self.start_sigmas, self.end_sigmas, strict=True)]
        bounds = [sum(lengths[:s]) / sum(lengths) for s in range(self.stages)] + [1.0]
        return list(pairwise(bounds))

    @cached_property
    def timesteps_per_stage(self) -> list[Tensor]:
        """The global timesteps of training in each stage, float64 ``[num_train_timesteps]``."""
        n, timesteps = self.num_train_timesteps, self.grid[0].tolist()
        return [
            _descending(timesteps[int(a * n)], timesteps[min(int(b * n), n - 1)], n)
            for a, b in self.timestep_ratios
        ]

    @cached_property
    def sigmas_per_stage(self) -> list[Tensor]:
        """The local sigmas of training in each stage, float64 ``[num_train_timesteps]``."""
        return [_descending(1.0, 0.0, self.num_train_timesteps) for _ in range(self.stages)]

    def set_timesteps(self, n_steps: int, stage: int) -> StageSteps:
        """The steps of one stage.

        They are evenly spaced from its first to its last training level, followed by 0. So the last
        interval is short, and a single step goes from 1 to 0.
        """
        self._check_stage(stage)
        if n_steps < 1:
            raise ValueError(f"n_steps: expected at least 1, got {n_steps}")
        timesteps, sigmas = self.timesteps_per_stage[stage], self.sigmas_per_stage[stage]
        inner = torch.linspace(*sigmas[[0, -1]].tolist(), n_steps, dtype=torch.float64)
        return StageSteps(
            torch.linspace(*timesteps[[0, -1]].tolist(), n_steps, dtype=torch.float64),
            torch.cat([inner, inner.new_zeros(1)]),
        )

    def renoise_coefficients(self, stage: int) -> tuple[float, float]:
        """alpha and beta of the jump from the stage before into ``stage``."""
        self._check_stage(stage)
        if stage == 0:
            raise ValueError("stage: expected at least 1, nothing jumps into stage 0")
        return renoise_coefficients(self.ori_start_sigmas[stage], self.gamma)

    @property
    def block_covariance(self) -> Tensor:
        """That of the noise in a 2 x 2 block, float64 ``[4, 4]``; singular for gamma = 1/3."""
        ones = torch.ones(4, 4, dtype=torch.float64)
        return (1 + self.gamma) * torch.eye(4, dtype=torch.float64) - self.gamma * ones

    def step(
        self,
        x: Tensor,
        velocity: Tensor,
        step: float,
        *,
        uncond: Tensor | None = None,
        guidance: float = 1.0,
        ops: Ops = EAGER,
    ) -> Tensor:
        """One Euler step, ``x + step * v`` with the guided v; ``step`` from `StageSteps.steps`."""
        return ops.euler_step(x, velocity, step, uncond=uncond, guidance=guidance)

    def _sigma_at(self, fraction: float) -> float:
        index = int(fraction * self.num_train_timesteps)
        return self.grid[1][index].item() if index < self.num_train_timesteps else 0.0

    def _check_stage(self, stage: int) -> None:
        if not 0 <= stage < self.stages:
            raise ValueError(f"stage: expected 0 to {self.stages - 1}, got {stage}")


def _descending(first: float, last: float, n: int) -> Tensor:
    """``n`` evenly spaced float64 numbers from ``first`` towards ``last``, which is left out."""
    return torch.linspace(first, last, n + 1, dtype=torch.float64)[:-1]
