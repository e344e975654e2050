"""Residuals, norms and modulation, each a separate operator."""

import torch
from torch import Tensor
from torch.nn import functional as F

from vidgen_kernels import Modulation


def residual_norm(
    x: Tensor,
    f: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    text: Modulation | None = None,
    text_length: int = 0,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    own = Modulation(gate, scale, shift)
    h = gated_residual(x, f, own, text, text_length)
    return h, norm_modulate(h, own, text, text_length, weight, bias, norm, eps)


def gated_residual(
    x: Tensor, f: Tensor | None, own: Modulation, text: Modulation | None, text_length: int
) -> Tensor:
    if f is None:
        return x
    if text is None:
        return x + f if own.gate is None else x + _of_tokens(own.gate) * f
    parts = []
    for part, m in ((slice(0, text_length), text), (slice(text_length, None), own)):
        gated = f[:, part] if m.gate is None else _of_tokens(m.gate) * f[:, part]
        parts.append(x[:, part] + gated)
    return torch.cat(parts, dim=1)


def norm_modulate(
    h: Tensor,
    own: Modulation,
    text: Modulation | None,
    text_length: int,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
) -> Tensor:
    """As in CogVideoX, text and video are sliced, normalised and modulated apart, then joined."""
    if text is not None:
        options = weight, bias, norm, eps
        return torch.cat(
            [
                norm_modulate(h[:, :text_length], text, None, 0, *options),
                norm_modulate(h[:, text_length:], own, None, 0, *options),
            ],
            dim=1,
        )
    if norm == "layer":
        a = F.layer_norm(h, h.shape[-1:], weight, bias, eps)
    else:
        a = rms_norm(h, weight, eps)
        a = a if bias is None else a + bias
    a = a if own.scale is None else a * (1 + _of_tokens(own.scale))
    return a if own.shift is None else a + _of_tokens(own.shift)


def _of_tokens(vector: Tensor) -> Tensor:
    """``[B, D]`` as ``[B, 1, D]``; vectors per token stay."""
    return vector[:, None] if vector.ndim == 2 else vector


def post_norm_residual(
    x: Tensor,
    f: Tensor,
    *,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-5,
) -> Tensor:
    if norm == "layer":
        n = F.layer_norm(f, f.shape[-1:], weight, bias, eps)
    else:
        n = rms_norm(f, weight, eps)
        n = n if bias is None else n + bias
    if gate is None:
        return x + n
    return x + n * (gate[:, None] if x.ndim == 3 and gate.ndim == 2 else gate)


def post_norm_adaln(
    x: Tensor,
    f: Tensor,
    *,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor,
    shift: Tensor,
    eps: float = 1e-5,
    next_eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    out = post_norm_residual(x, f, gate=gate, weight=weight, bias=bias, eps=eps)
    return residual_norm(out, scale=scale, shift=shift, eps=next_eps)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    return normed if weight is None else normed * weight
