"""Exact, fast Triton kernels for video-generation transformers."""

from .attention import block_causal_attention, set_masked_attention
from .feature_cache import CacheWindow, FeatureCache
from .interval_attention import interval_attention
from .intervals import IntervalMask
from .norms import Modulation, residual_norm
from .post_norm import post_norm_residual
from .post_norm_adaln import post_norm_adaln
from .pyramid import block_noise, downsample, renoise_coefficients, upsample_renoise
from .rope import QKVStream, qk_norm_rope
from .sampler import ddim_step, dpm_step, euler_step
from .training_pair import TrainingPair, training_pair

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
