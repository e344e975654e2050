"""The denoising MLP: a diffusion step of single tokens, given the image encoder's word on each.

    c = P_z(z) + P_t(t);  (s, b, gate) = W SiLU(c)
    x <- x + gate * LN(MLP(LN(x) * (1 + s) + b))      LN inside without weights, outside with

Tokens never meet, so any subset may be denoised alone. `forward` is for that: `embed_condition` and
`embed_time` can be called once for many steps, and the projections of SiLU(c) of all blocks are one
matrix product. `forward_latents` computes the same in the order of the released code.

Shapes: B rows, n tokens, p * p * C values of a token, D width of z, M width of the MLP.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

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

    The frequencies are those of `embeddings.frequencies`, rounded as the released code rounds them.
    """
    i = torch.arange(N_FREQUENCIES, dtype=torch.float32, device=timestep.device)
    angle = timestep.float()[..., None] * torch.exp(-math.log(10000) * i / N_FREQUENCIES)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class AdaptiveNorm(nn.Module):
    """The projection that an adaptive norm is modulated by."""

    def __init__(self, width: int, n_vectors: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, n_vectors * width)


class DenoisingBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = AdaptiveNorm(width, 3)
        self.proj = TwoLayers(width, width)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(self, x: Tensor, modulation: Tensor, ops: Ops) -> Tensor:
        """``x`` [B, n, M]; ``modulation`` [B, n or 1, 3M]: scale, shift, gate."""
        scale, shift, gate = modulation.chunk(3, dim=-1)
        _, a = ops.residual_norm(x, scale=scale, shift=shift, eps=ADAPTIVE_EPS)
        norm = self.norm2
        return ops.post_norm_residual(
            x, self.proj(a), gate=gate, weight=norm.weight, bias=norm.bias, eps=norm.eps
        )


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
        """Features of tokens ``[B, n, D]`` to ``[B, n, M]``; the same at every timestep."""
        return self.time_cond_embed.condition_proj(z)

    def embed_time(self, timestep: Tensor) -> Tensor:
        """``[...]`` timesteps, 0 to 1000, to ``[..., M]``; the same for all tokens."""
        return self.time_cond_embed.time(timestep)

    def modulation_projection(self) -> tuple[Tensor, Tensor]:
        """Weight ``[(3 depth + 2) M, M]`` and bias of the projections of all norms as one."""
        projections = [self.norm.proj, *(block.norm1.proj for block in self._blocks())]
        weight = torch.cat([projection.weight for projection in projections])
        return weight, torch.cat([projection.bias for projection in projections])

    def forward(
        self, x: Tensor, c: Tensor, projection: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Noise or velocity of the tokens ``x`` [B, n, p * p * C], of their shape.

        Args:
            c: sum of `embed_condition` and `embed_time`, ``[B, n or 1, M]``.
            projection: `modulation_projection`'s, for who calls it many times.
        """
        if projection is None:
            projection = self.modulation_projection()
        modulation = F.linear(F.silu(c), *projection)
        scale, shift, *others = modulation.split(self.head.in_features, dim=-1)
        return self.modulated(self.patch_embed.of_tokens(x), [*others, scale, shift])

    def modulated(self, h: Tensor, vectors: Sequence[Tensor]) -> Tensor:
        """The blocks and the head on embedded tokens ``[B, n, M]``.

        A block ends where the norm of the next one begins: one operator does both.

        Args:
            vectors: scale, shift and gate of each block, then scale and shift of the last norm,
                ``[B, n or 1, M]``.
        """
        _, a = self.ops.residual_norm(h, scale=vectors[0], shift=vectors[1], eps=ADAPTIVE_EPS)
        for i, block in enumerate(self._blocks()):
            gate, scale, shift = vectors[3 * i + 2 : 3 * i + 5]
            norm = block.norm2
            h, a = self.ops.post_norm_adaln(
                h,
                block.proj(a),
                gate=gate,
                weight=norm.weight,
                bias=norm.bias,
                scale=scale,
                shift=shift,
                eps=norm.eps,
                next_eps=ADAPTIVE_EPS,
            )
        return self.head(a)

    def read_out(self, x: Tensor, modulation: Tensor) -> Tensor:
        """``modulation`` [B, n or 1, 2M]: scale, shift."""
        scale, shift = modulation.chunk(2, dim=-1)
        _, a = self.ops.residual_norm(x, scale=scale, shift=shift, eps=ADAPTIVE_EPS)
        return self.head(a)

    def forward_latents(
        self, x: Tensor, timestep: Tensor, z: Tensor, ids: Tensor | None = None
    ) -> Tensor:
        """The released code's call: whole latents ``[B, C, h, w]`` in, ``[B, N, p * p * C]`` out.

        Args:
            timestep: ``[B]``, or ``[B, N]`` of every token.
            z: features of all tokens ``[B, N, D]``.
            ids: the tokens ``[B, n]`` to denoise; the others come back as they are.
        """
        tokens, h = patchify(x, self.patch_embed.patch), self.patch_embed(x)
        if ids is not None:
            h, z = take(h, ids), take(z, ids)
        time = self.embed_time(timestep)
        c = self.embed_condition(z) + (time if timestep.ndim == 2 else time[:, None])
        for block in self._blocks():
            h = block(h, block.norm1.proj(F.silu(c)), self.ops)
        out = self.read_out(h, self.norm.proj(F.silu(c)))
        if ids is None:
            return out
        return tokens.scatter(1, ids[:, :, None].expand_as(out), out)

    def _blocks(self) -> list[Any]:
        return [*self.blocks]
