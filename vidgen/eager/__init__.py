"""Plain PyTorch as the official models write it: the baseline that kernels are compared with.

`vidgen.ops.EAGER` collects these functions. Their arguments are those of `vidgen_kernels`, which
documents them.
"""

from .attention import attention, interval_attention, set_masked_attention
from .feature_cache import CacheWindow, mix, segment
from .norms import post_norm_adaln, post_norm_residual, residual_norm
from .pyramid import downsample, official_block_noise, training_pair, upsample_renoise
from .rope import qk_norm_rope
from .sampler import ddim_step, dpm_step, euler_step, linear_step

__all__ = [
    "CacheWindow",
    "attention",
    "ddim_step",
    "downsample",
    "dpm_step",
    "euler_step",
    "interval_attention",
    "linear_step",
    "mix",
    "official_block_noise",
    "post_norm_adaln",
    "post_norm_residual",
    "qk_norm_rope",
    "residual_norm",
    "segment",
    "set_masked_attention",
    "training_pair",
    "upsample_renoise",
]
