"""The denoising loop of one set of tokens: many diffusion steps of a small MLP.

The released code embeds, patchifies, combines and steps the whole latent at every step, of which a
set is one or two per cent. Tokens never meet in the MLP, so `SetDenoiser` keeps the set's tokens
``[B, n, P]`` alone for the whole loop, and does once what does not change in it:

    c_k = P_z(z) + P_t(t_k)        P_z(z) once per set, P_t(t_k) once per run
    W_j SiLU(c_k)                  of many steps k in one matrix product per block j: the weights,
                                   two thirds of the MLP's, are read once for all of those steps

`denoise_latents` is the released order, for comparison.

Branches of guidance are stacked on the batch. Shapes: G branches, B samples, n tokens of the set,
P = p * p * C values of a token, D width of z, M width of the MLP, K steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidgen.ops import Ops

from ..model.denoiser import DenoisingMLP
from ..model.embeddings import unpatchify
from .guidance import Guidance
from .steps import Step

# Modulations of as many steps as fit are computed at once: enough rows for an efficient product,
# few enough to stay near the processor.
TABLE_ELEMENTS = 2**23


class SetDenoiser:
    """Steps, guidance and weights, with the tables that all sets share."""

    def __init__(self, mlp: DenoisingMLP, steps: Sequence[Step], guidance: Guidance) -> None:
        self.mlp, self.steps, self.guidance = mlp, steps, guidance
        self.ops: Ops = mlp.ops
        timesteps = [step.timestep for step in steps]
        self.n_guided = guidance.n_guided(timesteps)
        device = mlp.head.weight.device
        self.times = mlp.embed_time(torch.tensor(timesteps, device=device))  # [K, M]
        blocks: list[Any] = [*mlp.blocks]
        self.projections = [block.norm1.proj for block in blocks] + [mlp.norm.proj]
        self.embedding = mlp.patch_embed.token_weight, mlp.patch_embed.proj.bias

    def __call__(
        self,
        z: Tensor,
        x: Tensor,
        scale: float,
        *,
        noise: Tensor | None = None,
        rest: Tensor | None = None,
        rest_noise: Tensor | None = None,
    ) -> Tensor:
        """Samples ``[B, n, P]`` from ``x``, standard normal.

        Args:
            z: features of the set's tokens, ``[G B, n, D]``.
            scale: of guidance.
            noise: of the steps that add some, ``[their number, B, n, P]``.
            rest, rest_noise: the same of all other tokens, ``[B, m, P]``: for the norms of
                `guidance_renorm`, None where there is none.
        """
        c, n_samples = self.mlp.embed_condition(z), len(x)
        noises, rest_noises = _of_steps(noise), _of_steps(rest_noise)
        # after the truncation of guidance, the conditional branch alone goes on
        for first, last, c_ in (
            (0, self.n_guided, c),
            (self.n_guided, len(self.steps), c[:n_samples]),
        ):
            n_branches = len(c_) // n_samples
            for step, modulations in self._modulations(c_.flatten(0, 1), first, last):
                own = next(noises, None) if step.needs_noise else None
                outside = next(rest_noises, None) if step.needs_noise else None
                prediction = self._predict(x, modulations, n_branches)
                if n_branches == 1:
                    x = step(x, prediction, self.ops, noise=own)
                elif self.guidance.is_plain:
                    cond, uncond = prediction.chunk(2)
                    x = step(x, cond, self.ops, uncond=uncond, guidance=scale, noise=own)
                else:
                    guided, passed = self.guidance.combine(prediction, scale, rest)
                    x = step(x, guided, self.ops, noise=own)
                    if rest is not None and passed is not None:
                        rest = step(rest, passed, self.ops, noise=outside)
        return x

    def _modulations(self, c: Tensor, first: int, last: int) -> Iterator[tuple[Step, list[Tensor]]]:
        """Steps, each with the vectors ``[1, R, M]`` of the blocks, three each, and the last norm.

        ``c``: [R, M], all rows of all branches.
        """
        n_vectors = sum(projection.out_features for projection in self.projections)
        n_steps = max(1, TABLE_ELEMENTS // (len(c) * n_vectors))
        for start in range(first, last, n_steps):
            stop = min(start + n_steps, last)
            h = F.silu(c + self.times[start:stop, None])[:, None]
            tables = [
                vectors.unbind()
                for projection in self.projections
                for vectors in projection(h).split(self.times.shape[1], dim=-1)
            ]
            for step, *modulations in zip(self.steps[start:stop], *tables, strict=True):
                yield step, modulations

    def _predict(self, x: Tensor, modulations: list[Tensor], n_branches: int) -> Tensor:
        """``[G B, n, P]`` of the tokens ``[B, n, P]`` that all branches share."""
        h = F.linear(x.reshape(1, -1, x.shape[2]), *self.embedding)
        h = torch.cat([h] * n_branches, dim=1)
        return self.mlp.modulated(h, modulations).view(-1, *x.shape[1:])


def _of_steps(noise: Tensor | None) -> Iterator[Tensor]:
    return iter(() if noise is None else noise.unbind())


def denoise_latents(
    mlp: DenoisingMLP,
    steps: Sequence[Step],
    guidance: Guidance,
    z: Tensor,  # [G B, N, D]
    x: Tensor,  # [B, C, h, w]
    ids: Tensor,  # [B, n]
    grid: tuple[int, int],
    scale: float,
    noise: Sequence[Tensor] | Tensor | None = None,  # [B, C, h, w] of each step that adds some
) -> Tensor:
    """The released order: the whole latent at every step, nothing done ahead.

    Tokens outside the set have themselves as prediction. Returns latents ``[B, C, h, w]``.
    """
    noises = iter(() if noise is None else noise)
    patch, n_guided = mlp.patch_embed.patch, guidance.n_guided([s.timestep for s in steps])
    for k, step in enumerate(steps):
        n_branches = guidance.n_branches if k < n_guided else 1
        timestep = torch.as_tensor(step.timestep, device=x.device).expand(n_branches * len(x))
        prediction = mlp.forward_latents(
            torch.cat([x] * n_branches), timestep, z[: len(timestep)], ids.repeat(n_branches, 1)
        )
        if n_branches > 1:
            prediction, _ = guidance.combine(prediction, scale)
        prediction = unpatchify(prediction, patch, grid)
        x = step(x, prediction, mlp.ops, noise=next(noises) if step.needs_noise else None)
    return x
