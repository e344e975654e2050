"""The few device and launch helpers that kernel files share."""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def scalar(x, dtype: tl.constexpr):
    """A float argument as ``dtype``: fp64 when compiled, a Python float when interpreted."""
    return tl.full([], x, dtype)


@triton.jit
def load_tile(ptr, offs_d, n_rows, HEAD_DIM: tl.constexpr, offs_row, MASK_ROWS: tl.constexpr):
    """Loads rows of ``ptr`` [rows, BLOCK_D]; zeros past ``HEAD_DIM`` and, if asked, past ``n_rows``."""
    if MASK_ROWS:
        mask = (offs_row < n_rows)[:, None] & (offs_d < HEAD_DIM)[None, :]
        return tl.load(ptr, mask=mask, other=0.0)
    if offs_d.shape[0] != HEAD_DIM:
        return tl.load(ptr, mask=(offs_d < HEAD_DIM)[None, :], other=0.0)
    return tl.load(ptr)


def is_interpreted() -> bool:
    """True where ``TRITON_INTERPRET=1`` asks for kernels on CPU tensors."""
    return triton.knobs.runtime.interpret


def accumulator_dtype(dtype: torch.dtype) -> tl.dtype:
    """Sums are kept in fp32, in fp64 for fp64 inputs."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def dot_precision(dtype: torch.dtype) -> str:
    """fp32 products are exact to fp32 rounding (three TF32 products) unless torch is allowed TF32."""
    if dtype == torch.float32:
        return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
    return "ieee"


def architecture(x: Tensor) -> str:
    """The row of the launch tables for the device of ``x``."""
    if x.device.type == "cpu":
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(x.device)
    return f"sm_{major}{minor}"
