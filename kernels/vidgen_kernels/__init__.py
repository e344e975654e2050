"""Exact, fast Triton kernels for video-generation transformers."""

from .attention import block_causal_attention, set_masked_attention
from .interval_attention import interval_attention
from .intervals import IntervalMask

__all__ = [
    "IntervalMask",
    "block_causal_attention",
    "interval_attention",
    "set_masked_attention",
]
