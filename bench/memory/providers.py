"""Memory-bound operators: our kernels against eager PyTorch, its compiler, and others' kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.measure.case import Function
from bench.measure.provider import Provider, as_table, needs_compiler, package
from bench.memory.calls import MemoryCall
from bench.memory.tokens import EPS
from vidgen import eager
from vidgen.ops import EAGER, FUSED
from vidgen.shapes import MEMORY_SETS


def _compiled(call: MemoryCall) -> Function:
    return torch.compile(call.function(EAGER), dynamic=False)


def _liger(call: MemoryCall) -> Function:
    """Its functions of rows and weights, told not to write into the incoming gradients."""
    from liger_kernel.ops.fused_add_rms_norm import (  # pyright: ignore[reportMissingImports]
        LigerFusedAddRMSNormFunction,
    )
    from liger_kernel.ops.layer_norm import (  # pyright: ignore[reportMissingImports]
        LigerLayerNormFunction,
    )

    def fused_add_rms_norm(x: Tensor, f: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        a, h = LigerFusedAddRMSNormFunction.apply(x, f, weight, EPS, 0.0, "llama", False)
        return h, a

    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return LigerLayerNormFunction.apply(x, weight, bias, EPS)

    functions = {"fused_add_rms_norm": fused_add_rms_norm, "layer_norm": layer_norm}
    return functions[call.spec.liger or ""]


def _no_liger(call: MemoryCall, backward: bool) -> str | None:
    return None if call.spec.liger else "liger-kernel has no such operator"


def _official_noise(call: MemoryCall) -> Function:
    """The released code draws block by block, on the host."""

    def upsample_renoise(x: Tensor, alpha: float, beta: float, *, seed: int) -> Tensor:
        *outer, height, width = x.shape
        noise = eager.official_block_noise((*outer, 2 * height, 2 * width)).to(x.device)
        return eager.upsample_renoise(x, alpha, beta, block_noise=noise)

    return call.function(EAGER._replace(upsample_renoise=upsample_renoise))


def _no_official_noise(call: MemoryCall, backward: bool) -> str | None:
    if not call.spec.draws_noise:
        return "only where noise is drawn"
    if call.dtype == torch.float64:
        return "draws in fp32"
    if call.spec.shape in MEMORY_SETS["real"].renoise:
        return "one draw per block on the host: seconds per call"
    return None


def _ops(ops) -> Callable[[MemoryCall], Function]:
    return lambda call: call.function(ops)


PROVIDERS = as_table(
    Provider("ours", "this package", _ops(FUSED), compiles=True),
    Provider("eager", "PyTorch as the official models write it", _ops(EAGER)),
    Provider(
        "compile",
        "the same, compiled by torch.compile (minutes on a CPU)",
        _compiled,
        missing=needs_compiler,
        default_on=("cuda",),
        compiles=True,
    ),
    Provider(
        "liger",
        "liger-kernel, plain norms",
        _liger,
        missing=package("liger-kernel", "liger_kernel"),
        refuses=_no_liger,
    ),
    Provider(
        "official",
        "block noise as Pyramid Flow draws it",
        _official_noise,
        refuses=_no_official_noise,
    ),
)
