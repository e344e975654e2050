"""Cases on latents: resampling between the stages of a pyramid, and sampler steps.

A comment beside `moves` lists what a forward reads and writes, then what a backward does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bench.memory.case import Draw, Floor, Inputs, MemoryCase, sum_dtype
from vidgen.ops import Ops
from vidgen.shapes import LatentShape
from vidgen_kernels import renoise_coefficients

ALPHA, BETA = renoise_coefficients(0.7)
GUIDANCE = 7.0
SEED = 2024


# ---- pyramid


@dataclass(frozen=True)
class Downsample(MemoryCase):
    """Means of 2 x 2 pixels."""

    shape: LatentShape
    op = "downsample"
    moves = Floor(1.25, 1.25)  # x -> y, a quarter of it;  the same backwards

    def tensors(self, draw: Draw) -> Inputs:
        return {"x": draw(*self.shape.size)}


@dataclass(frozen=True)
class Renoise(MemoryCase):
    """Up to the next stage, with white noise; ``draws_noise``: it is drawn inside."""

    shape: LatentShape
    op = "upsample_renoise"

    draws_noise: bool = False

    @property
    def variant(self) -> str:
        return "renoise_drawn" if self.draws_noise else "renoise"

    def tensors(self, draw: Draw) -> Inputs:
        *outer, height, width = self.shape.size
        x = draw(*outer, height // 2, width // 2)
        if self.draws_noise:
            return {"x": x}
        return {"x": x, "noise": draw(*self.shape.size)}

    @property
    def options(self) -> dict[str, Any]:
        seed = {"seed": SEED} if self.draws_noise else {}
        return {"alpha": ALPHA, "beta": BETA, **seed}

    def compared(self, inputs: Inputs, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Drawn noise differs between providers; its block sums and its variance do not."""
        if not self.draws_noise:
            return outputs
        out, low = outputs[0].double(), inputs["x"].double()
        eta = (out - ALPHA * _repeat(low)) / BETA
        n_blocks = low.numel()
        is_unit = (eta.square().mean() - 1).abs() < 10 * n_blocks**-0.5
        return [_mean4(out), is_unit.double()]

    def units(self, wide: float) -> Floor:
        # x, noise -> out;  dout -> dx, dnoise
        return Floor(1.25, 1.25) if self.draws_noise else Floor(2.25, 2.25)


@dataclass(frozen=True)
class TrainingPair(MemoryCase):
    """Input and target of a stage from a clean latent and noise."""

    shape: LatentShape
    op = "training_pair"
    moves = Floor(4, 4)  # clean, noise -> input, target;  the same backwards

    def tensors(self, draw: Draw) -> Inputs:
        clean, noise = (draw(*self.shape.size) for _ in range(2))
        sigma = torch.linspace(0.1, 0.9, self.shape.batch, device=draw.device)
        return {"clean": clean, "noise": noise, "sigma": sigma}

    def call(self, ops: Ops, inputs: Inputs) -> tuple[Tensor, ...]:
        # start and end of the middle of three stages
        pair = ops.training_pair(inputs["clean"], inputs["noise"], 0.8, 0.5, inputs["sigma"])
        return pair.input, pair.target


# ---- samplers


@dataclass(frozen=True)
class Euler(MemoryCase):
    """Guidance and a flow-matching step."""

    shape: LatentShape
    op = "euler_step"
    options: ClassVar = {"step": -0.05, "guidance": GUIDANCE}
    moves = Floor(4, 3)  # x, velocity, uncond -> out;  dout -> two gradients; dx is dout

    def tensors(self, draw: Draw) -> Inputs:
        return {name: draw(*self.shape.size) for name in ("x", "velocity", "uncond")}


@dataclass(frozen=True)
class DDIM(Euler):
    """Guidance and a step with v-prediction."""

    op = "ddim_step"
    options: ClassVar = {"sqrt_alpha": 0.6, "sqrt_alpha_next": 0.7, "guidance": GUIDANCE}
    moves = Floor(4, 4)  # x, velocity, uncond -> out;  dout -> three gradients


@dataclass(frozen=True)
class DPM(DDIM):
    """Guidance and a middle step of SDE-DPM-Solver++ 2M, with the clean prediction it keeps."""

    op = "dpm_step"
    options: ClassVar = {**DDIM.options, "sqrt_alpha_previous": 0.5}

    def tensors(self, draw: Draw) -> Inputs:
        found = super().tensors(draw)
        found["noise"] = draw(*self.shape.size).requires_grad_(False)
        found["previous"] = draw(*self.shape.size, dtype=sum_dtype(draw.dtype))
        return found

    def units(self, wide: float) -> Floor:
        # x, velocity, uncond, noise, previous -> out, x0;  dout, dx0 -> four gradients
        return Floor(5 + 2 * wide, 4 + 2 * wide)


def _repeat(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)


def _mean4(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).mean(dim=(-3, -1))
