"""The denoising MLP: predicts the noise or velocity of each token, conditioned on the image
encoder's feature z of that token and on the timestep t.

    c = P_z(z) + P_t(t);  (scale, shift, gate) = W SiLU(c)                      for each block
    x <- x + gate * LN(MLP(LN(x) * (1 + scale) + shift))

The inner LN has no weights, the outer one has. Tokens do not attend to each other, so a set of
them can be denoised alone: that is `forward`. `modulated` is the same for callers that have
computed the modulation of many steps before (`sampling/denoising.py`), and `forward_latents` is
the order of the released code, which denoises whole latents.

Shapes: B rows, n tokens, p * p * C values of a token, D width of z, M width of the MLP.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidgen.ops import Ops

from .embeddings import N_FREQUENCIES, PatchEmbed, patchify
from .vit import take

ADAPTIVE_EPS = 1e-6
NORM_EPS = 1e-5


class TwoLayers(nn.Module):
    def __init__(self, n_in: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(n_in, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x)))


class TimeConditionEmbed(nn.Module):
    def __init__(self, condition_width: int, width: int) -> None:
        super().__init__()
        self.timestep_proj = TwoLayers(2 * N_FREQUENCIES, width)
        self.condition_proj = TwoLayers(condition_width, width)

    def time(self, timestep: Tensor) -> Tensor:
        """``[...]`` timesteps, 0 to 1000, to ``[..., M]``."""
        return self.timestep_proj(timestep_features(timestep).to(self.timestep_proj.fc1.weight))


def timestep_features(timestep: Tensor) -> Tensor:
    """Cosines, then sines, fp32 ``[..., 256]``.

    The frequencies are those of `embeddings.frequencies`, computed as in the released code, whose
    rounding differs.
    """
    i = torch.arange(N_FREQUENCIES, dtype=torch.float32, device=timestep.device)
    angle = timestep.float()[..., None] * torch.exp(-math.log(10000) * i / N_FREQUENCIES)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class Vectors(NamedTuple):
    """Modulation of a norm, and the gate of the block that it begins, each ``[B, n or 1, M]``."""

    scale: Tensor
    shift: Tensor
    gate: Tensor | None = None  # None for the last norm, which begins no block


class AdaptiveNorm(nn.Module):
    """The projection of SiLU(c) to the `Vectors` of a norm; the norm has no other weights."""

    def __init__(self, width: int, n_vectors: int) -> None:
        super().__init__()
        self.n_vectors = n_vectors
        self.proj = nn.Linear(width, n_vectors * width)

    def vectors(self, c: Tensor) -> Vectors:
        """``c`` is SiLU(c), ``[B, n or 1, M]``."""
        return self.split(self.proj(c))

    def split(self, projected: Tensor) -> Vectors:
        """The projection of SiLU(c), ``[..., n_vectors * M]``, cut into its vectors."""
        return Vectors(*projected.chunk(self.n_vectors, dim=-1))


class DenoisingBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = AdaptiveNorm(width, 3)
        self.proj = TwoLayers(width, width)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(self, x: Tensor, vectors: Vectors, ops: Ops) -> Tensor:
        """``x`` and the result ``[B, n, M]``."""
        a, norm = modulate(x, vectors, ops), self.norm2
        return ops.post_norm_residual(
            x, self.proj(a), gate=vectors.gate, weight=norm.weight, bias=norm.bias, eps=norm.eps
        )


def modulate(x: Tensor, vectors: Vectors, ops: Ops) -> Tensor:
    """``LN(x) * (1 + scale) + shift``."""
    scale, shift, _ = vectors
    return ops.residual_norm(x, scale=scale, shift=shift, eps=ADAPTIVE_EPS)[1]


class DenoisingMLP(nn.Module):
    def __init__(
        self, depth: int, width: int, condition_width: int, n_channels: int, patch: int, ops: Ops
    ) -> None:
        super().__init__()
        self.ops = ops
        self.patch_embed = PatchEmbed(n_channels, width, patch)
        self.time_cond_embed = TimeConditionEmbed(condition_width, width)
        self.blocks = nn.ModuleList(DenoisingBlock(width) for _ in range(depth))
        self.norm = AdaptiveNorm(width, 2)
        self.head = nn.Linear(width, patch * patch * n_channels)

    def embed_condition(self, z: Tensor) -> Tensor:
        """``P_z(z)``: ``[B, n, D]`` to ``[B, n, M]``. It does not depend on the timestep."""
        return self.time_cond_embed.condition_proj(z)

    def embed_time(self, timestep: Tensor) -> Tensor:
        """``P_t(t)``: timesteps ``[...]``, 0 to 1000, to ``[..., M]``."""
        return self.time_cond_embed.time(timestep)

    @property
    def adaptive_norms(self) -> list[AdaptiveNorm]:
        """The norms of the blocks, then the last one."""
        return [*(block.norm1 for block in self._blocks()), self.norm]

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Noise or velocity of the tokens ``x`` [B, n, p * p * C], of their shape.

        The projections of all norms are one matrix product.

        Args:
            c: `embed_condition` + `embed_time`, ``[B, n or 1, M]``.
        """
        *of_blocks, of_head = self.adaptive_norms
        norms = [of_head, *of_blocks]  # kept in this order: another one may round differently
        weight = torch.cat([norm.proj.weight for norm in norms])
        bias = torch.cat([norm.proj.bias for norm in norms])
        widths = [norm.proj.out_features for norm in norms]
        projected = F.linear(F.silu(c), weight, bias).split(widths, dim=-1)
        last, *vectors = (norm.split(x) for norm, x in zip(norms, projected, strict=True))
        return self.modulated(self.patch_embed.of_tokens(x), [*vectors, last])

    def modulated(self, h: Tensor, vectors: Sequence[Vectors]) -> Tensor:
        """The blocks and the head on embedded tokens ``[B, n, M]``.

        One operator computes the end of a block and the modulated norm of the next.

        Args:
            vectors: one for each of `adaptive_norms`.
        """
        a = modulate(h, vectors[0], self.ops)
        for block, (own, following) in zip(self._blocks(), pairwise(vectors), strict=True):
            norm = block.norm2
            h, a = self.ops.post_norm_adaln(
                h,
                block.proj(a),
                gate=own.gate,
                weight=norm.weight,
                bias=norm.bias,
                scale=following.scale,
                shift=following.shift,
                eps=norm.eps,
                next_eps=ADAPTIVE_EPS,
            )
        return self.head(a)

    def forward_latents(
        self, x: Tensor, timestep: Tensor, z: Tensor, ids: Tensor | None = None
    ) -> Tensor:
        """The same in the order of the released code: latents ``[B, C, h, w]`` to all tokens.

        Args:
            timestep: ``[B]``, or ``[B, N]`` with one for each token.
            z: features of all tokens, ``[B, N, D]``.
            ids: the tokens to denoise, int64 ``[B, n]``; default all of them.

        Returns:
            ``[B, N, p * p * C]``; tokens that are not in ``ids`` are returned unchanged.
        """
        tokens, h = patchify(x, self.patch_embed.patch), self.patch_embed(x)
        if ids is not None:
            h, z = take(h, ids), take(z, ids)
        time = self.embed_time(timestep)
        c = self.embed_condition(z) + (time if timestep.ndim == 2 else time[:, None])
        for block in self._blocks():
            h = block(h, block.norm1.vectors(F.silu(c)), self.ops)
        out = self.head(modulate(h, self.norm.vectors(F.silu(c)), self.ops))
        if ids is None:
            return out
        return tokens.scatter(1, ids[:, :, None].expand_as(out), out)

    def _blocks(self) -> list[Any]:
        return [*self.blocks]
