"""What every attention function does with its arguments before an operator sees them."""

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
MAX_HEAD_DIM = 256


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """ValueError unless q, k, v are what the kernels take."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name}: expected shape [B, H, T, D], got {list(x.shape)}")
        if x.dtype not in DTYPES or x.dtype != q.dtype:
            wanted = (
                "one of " + ", ".join(map(str, DTYPES)) if name == "q" else f"{q.dtype} as q has"
            )
            raise ValueError(f"{name}: expected dtype {wanted}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected device {q.device} as q has, got {x.device}")
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(f"{name}: expected a contiguous last dim, got strides {x.stride()}")
    n_batch, n_heads, _, head_dim = q.shape
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"q: expected a head dim of 1 to {MAX_HEAD_DIM}, got {head_dim}")
    if k.shape != v.shape:
        raise ValueError(f"v: expected shape {list(k.shape)} as k has, got {list(v.shape)}")
    if (k.shape[0], k.shape[3]) != (n_batch, head_dim):
        expected = f"[{n_batch}, Hkv, Tk, {head_dim}]"
        raise ValueError(f"k: expected shape {expected} to match q, got {list(k.shape)}")
    if k.shape[1] == 0 or n_heads % k.shape[1]:
        raise ValueError(f"k: expected a head count that divides {n_heads}, got {k.shape[1]}")


def resolve_scale(q: Tensor, softmax_scale: float | None) -> tuple[Tensor, float]:
    """Default and sign: kernels scale after the maximum, so what is not positive goes into q."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    return (q, scale) if scale > 0 else (q * scale, 1.0)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)
