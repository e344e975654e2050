"""NOVA's noise schedules, and the sizes of the sets of a frame.

`FlowMatching` and `DDPM` are the schedulers of diffusers that the released pipeline uses, and read
its scheduler_config.json. ``schedule.steps(n)`` gives the n steps of a run (`steps.py`), each with
the timestep that the denoiser is given. The last step of DDPM goes to alpha_bar = 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .steps import DDPMStep, EulerStep, Step


def set_sizes(n_tokens: int, n_steps: int) -> list[int]:
    """The number of tokens in each set, by the cosine schedule; sets may be empty."""
    counts = masked_counts(n_tokens, n_steps)
    return [a - b for a, b in itertools.pairwise(counts)]


def masked_counts(n_tokens: int, n_steps: int) -> list[int]:
    """The number of tokens still masked before each set, and 0 after the last."""
    if n_steps < 1:
        raise ValueError(f"n_steps: expected at least 1, got {n_steps}")
    # Python and NumPy both round half to even.
    return [round(n_tokens * math.cos(math.pi / 2 * i / n_steps)) for i in range(n_steps + 1)]


@dataclass(frozen=True)
class MaskRatio:
    """The share of a frame that is masked in training: a truncated normal distribution."""

    loc: float = 1.0
    scale: float = 0.25
    low: float = 0.7
    high: float = 1.0

    @property
    def _ends(self) -> Tensor:
        """``low`` and ``high`` in units of the standard normal distribution."""
        ends = torch.tensor([self.low, self.high], dtype=torch.float64)
        return (ends - self.loc) / self.scale

    def quantile(self, uniform: Tensor) -> Tensor:
        """The inverse of the distribution function, fp64: a ratio for each number in [0, 1]."""
        low, high = torch.special.ndtr(self._ends)
        return self.loc + self.scale * torch.special.ndtri(low + uniform.double() * (high - low))

    @property
    def mean_and_std(self) -> tuple[float, float]:
        a, b = self._ends
        density = (-self._ends.square() / 2).exp() / math.sqrt(2 * math.pi)
        share = torch.special.ndtr(b) - torch.special.ndtr(a)
        mean = (density[0] - density[1]) / share
        variance = 1 + (a * density[0] - b * density[1]) / share - mean**2
        return self.loc + self.scale * mean.item(), self.scale * variance.sqrt().item()


@dataclass(frozen=True)
class FlowMatching:
    """FlowMatchEulerDiscreteScheduler: noise level sigma from 1 to 0, timestep 1000 sigma."""

    num_train_timesteps: int = 1000
    shift: float = 1.0
    table_shift: float | None = None  # of the range that steps are spaced over; default: `shift`

    def __post_init__(self) -> None:
        if self.num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps: expected >= 1, got {self.num_train_timesteps}")
        for name, shift in (("shift", self.shift), ("table_shift", self.table_shift)):
            if shift is not None and not 0 < shift < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {shift}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> FlowMatching:
        return cls(**_options(cls, config, FLOW_MATCHING_FIXED))

    def training_sigmas(self, *, base: bool = False) -> Tensor:
        """Descending, fp32 ``[num_train_timesteps]``; the timesteps are ``sigma * n``.

        Args:
            base: shifted by `table_shift` instead of `shift`.
        """
        n = self.num_train_timesteps
        sigmas = torch.arange(n, 0, -1, dtype=torch.float64) / n
        shift = self.table_shift if base and self.table_shift is not None else self.shift
        return _shifted(sigmas, shift).float()

    def sigmas(self, n_steps: int) -> Tensor:
        """Noise levels of a run, descending to 0, fp32 ``[n_steps + 1]``.

        As in diffusers they are evenly spaced between the ends of the training levels, which are
        shifted already, and then shifted. Setting diffusers' shift after construction does not
        change those ends: `table_shift` is the shift that they have.
        """
        _check_steps(n_steps, self.num_train_timesteps)
        ends = self.training_sigmas(base=True)[[0, -1]].tolist()
        sigmas = _shifted(torch.linspace(*ends, n_steps, dtype=torch.float64), self.shift)
        return torch.cat([sigmas, sigmas.new_zeros(1)]).float()

    def steps(self, n_steps: int) -> list[Step]:
        sigmas = self.sigmas(n_steps)
        timesteps = (sigmas[:-1] * self.num_train_timesteps).tolist()
        return [EulerStep(t, d) for t, d in zip(timesteps, sigmas.diff().tolist(), strict=True)]


def _shifted(sigmas: Tensor, shift: float) -> Tensor:
    return shift * sigmas / (1 + (shift - 1) * sigmas)


@dataclass(frozen=True)
class DDPM:
    """DDPMScheduler, with the defaults of its JSON."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    variance_type: str = "fixed_small"
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0

    def __post_init__(self) -> None:
        if self.num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps: expected >= 1, got {self.num_train_timesteps}")
        for name, known in DDPM_CHOICES.items():
            if getattr(self, name) not in known:
                got = f"got {getattr(self, name)!r}"
                raise ValueError(f"{name}: expected one of {', '.join(known)}, {got}")
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            got = f"got {len(self.trained_betas)}"
            raise ValueError(f"trained_betas: expected {self.num_train_timesteps} numbers, {got}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DDPM:
        return cls(**_options(cls, config, DDPM_FIXED))

    @property
    def betas(self) -> Tensor:
        """fp64 ``[num_train_timesteps]``."""
        n, ends = self.num_train_timesteps, (self.beta_start, self.beta_end)
        if self.trained_betas is not None:
            return torch.tensor(self.trained_betas, dtype=torch.float64)
        if self.beta_schedule == "linear":
            return torch.linspace(*ends, n, dtype=torch.float64)
        if self.beta_schedule == "scaled_linear":
            roots = (x**0.5 for x in ends)
            return torch.linspace(*roots, n, dtype=torch.float64) ** 2
        if self.beta_schedule == "sigmoid":
            x = torch.linspace(-6, 6, n, dtype=torch.float64)
            return x.sigmoid() * (self.beta_end - self.beta_start) + self.beta_start
        level = (torch.arange(n + 1, dtype=torch.float64) / n + 0.008) / 1.008 * (math.pi / 2)
        alpha_bar = level.cos() ** 2
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)

    @property
    def alphas_cumprod(self) -> Tensor:
        """fp32 ``[num_train_timesteps]``, from betas rounded to fp32, as diffusers has it."""
        return (1 - self.betas.float()).cumprod(0)

    def timesteps(self, n_steps: int) -> list[int]:
        n = self.num_train_timesteps
        _check_steps(n_steps, n)
        if self.timestep_spacing == "linspace":
            spaced = torch.linspace(0, n - 1, n_steps, dtype=torch.float64).round().flip(0)
        elif self.timestep_spacing == "leading":
            spaced = torch.arange(n_steps).flip(0) * (n // n_steps) + self.steps_offset
        else:
            # computed as numpy.arange does, whose rounding decides where the number is halfway
            step = (n - n / n_steps) - n
            spaced = (n + torch.arange(n_steps, dtype=torch.float64) * step).round() - 1
        return spaced.long().tolist()

    def steps(self, n_steps: int) -> list[Step]:
        timesteps = self.timesteps(n_steps)
        if max(timesteps) >= self.num_train_timesteps:
            expected = f"expected timesteps below {self.num_train_timesteps}"
            raise ValueError(f"steps_offset: {expected}, got up to {max(timesteps)}")
        alphas = self.alphas_cumprod.tolist()
        previous = [*timesteps[1:], -1]
        return [
            self._step(t, alphas[t], alphas[p] if p >= 0 else 1.0)
            for t, p in zip(timesteps, previous, strict=True)
        ]

    def _step(self, timestep: int, alpha: float, alpha_prev: float) -> DDPMStep:
        beta = 1 - alpha / alpha_prev
        is_large = self.variance_type == "fixed_large"
        variance = beta if is_large else (1 - alpha_prev) / (1 - alpha) * beta
        variance = max(variance, 1e-20) if not is_large else variance
        a_x, a_v = {
            "epsilon": (alpha**-0.5, -(((1 - alpha) / alpha) ** 0.5)),
            "sample": (0.0, 1.0),
            "v_prediction": (alpha**0.5, -((1 - alpha) ** 0.5)),
        }[self.prediction_type]
        return DDPMStep(
            timestep=float(timestep),
            c_x=(alpha / alpha_prev) ** 0.5 * (1 - alpha_prev) / (1 - alpha),
            c_0=alpha_prev**0.5 * beta / (1 - alpha),
            std=variance**0.5,
            a_x=a_x,
            a_v=a_v,
            clip=self.clip_sample_range if self.clip_sample else None,
        )


Schedule = FlowMatching | DDPM

DDPM_CHOICES = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large"),
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
}
# Options of diffusers that must have their defaults, and those that change nothing then.
DDPM_FIXED = {"thresholding": False, "rescale_betas_zero_snr": False}
FLOW_MATCHING_FIXED = {
    "use_dynamic_shifting": False,
    "shift_terminal": None,
    "invert_sigmas": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "stochastic_sampling": False,
}
UNREAD = (
    "dynamic_thresholding_ratio",
    "sample_max_value",  # of thresholding
    "base_image_seq_len",
    "max_image_seq_len",
    "base_shift",
    "max_shift",
    "time_shift_type",  # of dynamic shifting
)

CLASSES = {"FlowMatchEulerDiscreteScheduler": FlowMatching, "DDPMScheduler": DDPM}


def read_schedule(config: Mapping[str, Any]) -> Schedule:
    """The schedule of a scheduler_config.json, by its ``_class_name``.

    Raises:
        ValueError: another class, options that are unknown or not built.
    """
    name = config.get("_class_name")
    if name not in CLASSES:
        raise ValueError(f"_class_name: expected one of {', '.join(CLASSES)}, got {name!r}")
    return CLASSES[name].from_config(config)


def _options(cls: type, config: Mapping[str, Any], fixed: Mapping[str, Any]) -> dict[str, Any]:
    for name, default in fixed.items():
        if config.get(name, default) != default:
            raise ValueError(f"{name}: expected {default!r}, got {config[name]!r}")
    names = {field.name for field in fields(cls)}
    unknown = config.keys() - names - fixed.keys() - set(UNREAD)
    unknown = sorted(name for name in unknown if not name.startswith("_"))
    if unknown:
        raise ValueError(f"scheduler: expected options of {cls.__name__}, got also {unknown}")
    given = {name: config[name] for name in names if name in config}
    return {name: tuple(x) if isinstance(x, list) else x for name, x in given.items()}


def _check_steps(n_steps: int, most: int) -> None:
    if not 1 <= n_steps <= most:
        raise ValueError(f"n_steps: expected 1 to {most}, got {n_steps}")
