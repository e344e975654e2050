"""A drop-in for diffusers' CogVideoX, and RepVideo (arXiv 2501.08994) on top of it.

    handle = accelerate(pipeline)                # the same numbers from fused kernels
    handle = accelerate(pipeline, gates=gates)   # RepVideo: blocks read a mix of earlier outputs
    handle.restore()                             # or: with accelerate(pipeline): ...

Attention gets a processor by ``set_attn_processor``, and blocks get another forward method.
Parameters, their names and hooks stay. `_cogvideox.py` has the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import diffusers
from torch import Tensor

if TYPE_CHECKING:
    from ._acceleration import Acceleration

SUPPORTED = ("0.42.1",)


def accelerate(
    model: Any,
    gates: Tensor | Sequence[float] | float | None = None,
) -> Acceleration:
    """Makes a CogVideoX of diffusers run on the kernels of this package, until it is restored.

    LoRA, hooks, block caches, gradient checkpointing and torch.compile may come before or after.
    Norms are read and not called: offload models or blocks, not leaf modules.

    Args:
        model: a CogVideoXTransformer3DModel, or a pipeline that has one.
        gates: None for CogVideoX itself. Else RepVideo's gates, one for each block ``[L]`` or one
            for all: block i reads ``gate * mean + (1 - gate) * y``, y the output of the block
            before it and mean that of the window's outputs. They live in
            ``transformer.feature_cache``: a Parameter is trained, and is in the state dict as
            ``feature_cache.gates``; other values are a buffer that is not. Blocks then hand each
            other unfinished sums, so nothing may skip or hook them. The output head keeps its eps,
            1e-5 in diffusers, where the released RepVideo has 1e-6
            (``transformer.norm_out.norm.eps``).

    Raises:
        ValueError: another model, one that is accelerated already, processors or wrappers that
            would be lost, gates that do not fit. The model is as before.
        ImportError: a version of diffusers that this is not tested with.
    """
    if diffusers.__version__ not in SUPPORTED:
        expected = " or ".join(SUPPORTED)
        raise ImportError(f"diffusers: expected version {expected}, got {diffusers.__version__}")
    from ._acceleration import Acceleration  # imports what other versions may not have

    return Acceleration(model, gates)
