"""Single steps of a noise schedule: from x to the next x, given the denoiser's prediction.

    flow matching   x' = x + (sigma_next - sigma) v
    DDPM            x' = sqrt(a_prev) b / (1 - a) x0 + sqrt(a / a_prev) (1 - a_prev) / (1 - a) x
                         + sigma noise,   x0 = (x - sqrt(1 - a) e) / sqrt(a),   b = 1 - a / a_prev

with ``a`` = alpha_bar, v and e the prediction. Given ``uncond``, the prediction is
``uncond + guidance * (prediction - uncond)``.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from vidgen.ops import LinearStep, Ops


class EulerStep(NamedTuple):
    """A step of the flow-matching ODE."""

    timestep: float
    delta: float  # sigma_next - sigma

    @property
    def needs_noise(self) -> bool:
        return False

    def __call__(
        self,
        x: Tensor,
        prediction: Tensor,
        ops: Ops,
        *,
        uncond: Tensor | None = None,
        guidance: float = 1.0,
        noise: Tensor | None = None,
    ) -> Tensor:
        return ops.euler_step(x, prediction, self.delta, uncond=uncond, guidance=guidance)


class DDPMStep(NamedTuple):
    """``x' = c_x x + c_0 x0 + std noise`` with ``x0 = a_x x + a_v prediction``."""

    timestep: float
    c_x: float
    c_0: float
    std: float
    a_x: float
    a_v: float
    clip: float | None  # x0 is clipped to [-clip, clip]

    @property
    def needs_noise(self) -> bool:
        return self.timestep > 0

    def __call__(
        self,
        x: Tensor,
        prediction: Tensor,
        ops: Ops,
        *,
        uncond: Tensor | None = None,
        guidance: float = 1.0,
        noise: Tensor | None = None,
    ) -> Tensor:
        std = self.std if self.needs_noise else 0.0
        noise = noise if self.needs_noise else None
        if self.clip is None:
            c_x, c_v = self.c_x + self.c_0 * self.a_x, self.c_0 * self.a_v
            step = LinearStep(c_x=c_x, c_v=c_v, c_z=std)
            return ops.linear_step(
                x, prediction, step, uncond=uncond, guidance=guidance, noise=noise
            )[0]
        # clipping is not linear: x0, in fp32 or wider, is a step of its own
        x0_step = LinearStep(a_x=self.a_x, a_v=self.a_v)
        _, x0 = ops.linear_step(
            x, prediction, x0_step, uncond=uncond, guidance=guidance, return_x0=True
        )
        step = LinearStep(c_x=self.c_x, c_v=self.c_0, c_z=std)
        return ops.linear_step(x, x0.clamp(-self.clip, self.clip), step, noise=noise)[0]


Step = EulerStep | DDPMStep
