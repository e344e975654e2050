"""The operators that models call: a model takes `ops`, either `EAGER` or `FUSED`.

`EAGER` is plain PyTorch as the official models write it, the baseline of benchmarks; `FUSED` are
the kernels. Neither has parameters, so state dicts do not depend on the choice. Models import
`vidgen_kernels` only through this file.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

import vidgen_kernels as fused
from vidgen import eager
from vidgen_kernels import (
    IntervalMask,
    Modulation,
    QKVStream,
    TrainingPair,
    feature_cache,
    renoise_coefficients,
)
from vidgen_kernels.common.front_door import is_traced
from vidgen_kernels.latents.sampler import LinearStep, linear_step

__all__ = [
    "EAGER",
    "FUSED",
    "OPS",
    "IntervalMask",
    "LinearStep",
    "Modulation",
    "Ops",
    "QKVStream",
    "TrainingPair",
    "is_traced",
    "renoise_coefficients",
]


class Ops(NamedTuple):
    """Operators with the arguments and results of the functions in `vidgen_kernels`."""

    attention: Callable[..., Any]  # (q, k, v): every query sees every key
    interval_attention: Callable[..., Any]
    set_masked_attention: Callable[..., Any]
    residual_norm: Callable[..., Any]
    mix: Callable[..., Any]
    segment: Callable[..., Any]
    feature_cache: Callable[..., Any]  # (gates, window) -> CacheWindow, one for a forward pass
    qk_norm_rope: Callable[..., Any]
    post_norm_residual: Callable[..., Any]
    post_norm_adaln: Callable[..., Any]
    downsample: Callable[..., Any]
    upsample_renoise: Callable[..., Any]
    training_pair: Callable[..., Any]
    euler_step: Callable[..., Any]
    ddim_step: Callable[..., Any]
    dpm_step: Callable[..., Any]
    linear_step: Callable[..., Any]


def _fused_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    mask = IntervalMask.full([q.shape[2]], [k.shape[2]], device=q.device)
    return fused.interval_attention(q, k, v, mask, return_lse=return_lse)


EAGER = Ops(
    attention=eager.attention,
    interval_attention=eager.interval_attention,
    set_masked_attention=eager.set_masked_attention,
    residual_norm=eager.residual_norm,
    mix=eager.mix,
    segment=eager.segment,
    feature_cache=eager.CacheWindow,
    qk_norm_rope=eager.qk_norm_rope,
    post_norm_residual=eager.post_norm_residual,
    post_norm_adaln=eager.post_norm_adaln,
    downsample=eager.downsample,
    upsample_renoise=eager.upsample_renoise,
    training_pair=eager.training_pair,
    euler_step=eager.euler_step,
    ddim_step=eager.ddim_step,
    dpm_step=eager.dpm_step,
    linear_step=eager.linear_step,
)
FUSED = Ops(
    attention=_fused_attention,
    interval_attention=fused.interval_attention,
    set_masked_attention=fused.set_masked_attention,
    residual_norm=fused.residual_norm,
    mix=feature_cache.mix,
    segment=feature_cache.segment,
    feature_cache=fused.CacheWindow,
    qk_norm_rope=fused.qk_norm_rope,
    post_norm_residual=fused.post_norm_residual,
    post_norm_adaln=fused.post_norm_adaln,
    downsample=fused.downsample,
    upsample_renoise=fused.upsample_renoise,
    training_pair=fused.training_pair,
    euler_step=fused.euler_step,
    ddim_step=fused.ddim_step,
    dpm_step=fused.dpm_step,
    linear_step=linear_step,
)
OPS = {"eager": EAGER, "fused": FUSED}
