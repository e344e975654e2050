"""Questions of launchers: which device, which precision, are kernels interpreted?"""

import torch
import triton.language as tl
from torch import Tensor
from triton import knobs


def is_interpreted() -> bool:
    """Whether ``TRITON_INTERPRET=1`` is set: Triton then interprets kernels on CPU tensors."""
    return knobs.runtime.interpret


def accumulator_dtype(dtype: torch.dtype) -> tl.dtype:
    """The dtype of sums in kernels: fp32, or fp64 for fp64 inputs."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of `tl.dot`: three TF32 products for fp32, one if torch may use TF32.

    `fp32_precision` reflects every way to allow TF32. `allow_tf32` cannot be read after some.
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
