"""What launchers ask before a launch: architecture, precision, whether kernels are interpreted."""

import torch
import triton.language as tl
from torch import Tensor
from triton import knobs


def is_interpreted() -> bool:
    """True where ``TRITON_INTERPRET=1`` asks for kernels on CPU tensors."""
    return knobs.runtime.interpret


def accumulator_dtype(dtype: torch.dtype) -> tl.dtype:
    """The dtype of sums: fp32, or fp64 for fp64 inputs."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def dot_precision(dtype: torch.dtype) -> str:
    """An fp32 product is made of three TF32 products, unless torch is allowed to use plain TF32.

    `fp32_precision` follows all ways to say so; `allow_tf32` may not be read after some of them.
    """
    if dtype == torch.float32:
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"
    return "ieee"


def architecture(x: Tensor) -> int | None:
    """Compute capability of the device of ``x`` (80, 90, ...), None for the interpreter."""
    if x.device.type == "cpu":
        return None
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor
