"""Queries and keys: split into heads, normalised, then rotated by tables of cosines and sines."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vidgen_kernels import QKVStream

from .norms import rms_norm


def qk_norm_rope(
    stream: QKVStream,
    positions: Tensor | None = None,
    axes: Sequence[int] = (),
    *,
    n_heads: int,
    text: QKVStream | None = None,
    text_length: int = 0,
    norm: str | None = "rms",
    eps: float = 1e-6,
    theta: float = 10000.0,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _normed_heads(stream, n_heads, norm, eps)
    if text is not None:
        joined = zip(_normed_heads(text, n_heads, norm, eps), (q, k, v), strict=True)
        q, k, v = (torch.cat(pair, dim=2) for pair in joined)
    if positions is not None:
        angles = torch.cat(
            [
                position.double() * theta ** (-torch.arange(0, d, 2).to(position.double()) / d)
                for position, d in zip(positions.split(1, dim=-1), axes, strict=True)
            ],
            dim=-1,
        )
        angles = angles.unsqueeze(-3)  # the same for all heads
        if text is not None:  # at position 0, so not rotated
            angles = F.pad(angles, (0, 0, q.shape[2] - angles.shape[-2], 0))
        dtype = torch.promote_types(q.dtype, torch.float32)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        if text_length:
            q[:, :, text_length:] = _rotate_pairs(q[:, :, text_length:], cos, sin)
            k[:, :, text_length:] = _rotate_pairs(k[:, :, text_length:], cos, sin)
        else:
            q, k = _rotate_pairs(q, cos, sin), _rotate_pairs(k, cos, sin)
    return q, k, v


def _normed_heads(
    stream: QKVStream, n_heads: int, norm: str | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, H, T, D]; q and k are new tensors."""
    qkv = stream.projections
    qkv = qkv.chunk(3, dim=-1) if isinstance(qkv, Tensor) else qkv
    q, k, v = (x.unflatten(-1, (n_heads, -1)).transpose(1, 2) for x in qkv)
    if norm == "layer":
        q = F.layer_norm(q, q.shape[-1:], stream.q_weight, stream.q_bias, eps)
        k = F.layer_norm(k, k.shape[-1:], stream.k_weight, stream.k_bias, eps)
    elif norm == "rms":
        q, k = rms_norm(q, stream.q_weight, eps), rms_norm(k, stream.k_weight, eps)
    else:
        q, k = q.clone(), k.clone()
    return q, k, v


def _rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).type_as(x)
