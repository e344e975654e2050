"""Exact, fast Triton kernels for video-generation transformers."""

from .attention.block_causal import block_causal_attention
from .attention.interval_attention import interval_attention
from .attention.intervals import IntervalMask
from .attention.set_masked import set_masked_attention
from .feature_cache import CacheWindow, FeatureCache
from .latents.pyramid import block_noise, downsample, renoise_coefficients, upsample_renoise
from .latents.sampler import ddim_step, dpm_step, euler_step
from .latents.training_pair import TrainingPair, training_pair
from .norms.arguments import Modulation
from .norms.post_norm import post_norm_residual
from .norms.post_norm_adaln import post_norm_adaln
from .norms.residual_norm import residual_norm
from .rope.qk_norm_rope import QKVStream, qk_norm_rope

__all__ = [
    "CacheWindow",
    "FeatureCache",
    "IntervalMask",
    "Modulation",
    "QKVStream",
    "TrainingPair",
    "block_causal_attention",
    "block_noise",
    "ddim_step",
    "downsample",
    "dpm_step",
    "euler_step",
    "interval_attention",
    "post_norm_adaln",
    "post_norm_residual",
    "qk_norm_rope",
    "renoise_coefficients",
    "residual_norm",
    "set_masked_attention",
    "training_pair",
    "upsample_renoise",
]
