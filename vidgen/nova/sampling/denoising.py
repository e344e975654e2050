"""The denoising loop of one set of tokens: many diffusion steps of a small MLP.

At every step the released code works on the whole latent, of which a set is one or two per cent.
Tokens do not attend to each other in the MLP, so `SetDenoiser` works on the tokens of the set alone
and computes once what does not change from step to step:

    c_k = P_z(z) + P_t(t_k)        P_z(z) once per set, P_t(t_k) once per run
    W_j SiLU(c_k)                  for many steps k in one matrix product per block j: the weights
                                   W_j, two thirds of the MLP's, are read once for those steps

`denoise_latents` is the released order, to compare with. `frames.py` calls both.

Branches of guidance are stacked on the batch. Shapes: G branches, B samples, n tokens of the set,
P = p * p * C values of a token, D width of z, M width of the MLP, K steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vidgen.ops import Ops

from ..model.denoiser import DenoisingMLP, Vectors
from ..model.embeddings import unpatchify
from .guidance import Guidance
from .steps import Step

# The most elements that modulations computed at once may have: enough steps for an efficient matrix
# product, few enough for the result to stay in the cache.
TABLE_ELEMENTS = 2**23


class SetDenoiser:
    """Denoises sets, one call for each; what all sets share is computed here, once."""

    def __init__(self, mlp: DenoisingMLP, steps: Sequence[Step], guidance: Guidance) -> None:
        self.mlp, self.steps, self.guidance = mlp, steps, guidance
        self.ops: Ops = mlp.ops
        timesteps = [step.timestep for step in steps]
        self.n_guided = guidance.n_guided(timesteps)
        device = mlp.head.weight.device
        self.times = mlp.embed_time(torch.tensor(timesteps, device=device))  # [K, M]
        self.norms = mlp.adaptive_norms
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
        """Samples ``[B, n, P]``, starting from the noise ``x`` of that shape.

        Args:
            z: features of the set's tokens, ``[G B, n, D]``.
            scale: the guidance scale.
            noise: for the steps that add noise, ``[number of them, B, n, P]``.
            rest, rest_noise: ``x`` and ``noise`` of the frame's other tokens, ``[B, m, P]`` and
                ``[number of steps, B, m, P]``, which enter the norms of `guidance_renorm`; None
                without it.
        """
        c, n_samples = self.mlp.embed_condition(z), len(x)
        noises, rest_noises = _of_steps(noise), _of_steps(rest_noise)
        # after the truncation of guidance only the conditional branch runs
        for first, last, c_ in (
            (0, self.n_guided, c),
            (self.n_guided, len(self.steps), c[:n_samples]),
        ):
            n_branches = len(c_) // n_samples
            for step, vectors in self._modulations(c_.flatten(0, 1), first, last):
                own = next(noises, None) if step.needs_noise else None
                outside = next(rest_noises, None) if step.needs_noise else None
                prediction = self._predict(x, vectors, n_branches)
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

    def _modulations(
        self, c: Tensor, first: int, last: int
    ) -> Iterator[tuple[Step, list[Vectors]]]:
        """Steps ``first`` to ``last - 1``, each with the vectors ``[1, R, M]`` of all norms.

        ``c`` [R, M] has the rows of all branches, without the time.
        """
        n_elements = sum(norm.proj.out_features for norm in self.norms)
        n_steps = max(1, TABLE_ELEMENTS // (len(c) * n_elements))
        for start in range(first, last, n_steps):
            stop = min(start + n_steps, last)
            h = F.silu(c + self.times[start:stop, None])[:, None]
            tables = [_by_step(norm.vectors(h)) for norm in self.norms]
            for step, *vectors in zip(self.steps[start:stop], *tables, strict=True):
                yield step, vectors

    def _predict(self, x: Tensor, vectors: list[Vectors], n_branches: int) -> Tensor:
        """``[G B, n, P]`` for the tokens ``[B, n, P]``, the same in all branches."""
        h = F.linear(x.reshape(1, -1, x.shape[2]), *self.embedding)
        h = torch.cat([h] * n_branches, dim=1)
        return self.mlp.modulated(h, vectors).view(-1, *x.shape[1:])


def _by_step(vectors: Vectors) -> list[Vectors]:
    """Vectors of K steps, ``[K, 1, R, M]`` each, apart."""
    parts = (x.unbind() for x in vectors if x is not None)
    return [Vectors(*of_step) for of_step in zip(*parts, strict=True)]


def _of_steps(noise: Tensor | None) -> Iterator[Tensor]:
    """The noise of one step after another."""
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
    """The same in the released order: the whole latent at every step, nothing computed ahead.

    The prediction for tokens outside the set is their own value. Returns latents ``[B, C, h, w]``,
    in which only the tokens of the set have a meaning.
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
