"""Checks and casts of arguments, which public functions do before they call an operator."""

import math
from typing import Any, overload

import torch
from torch import Tensor
from torch._C._functorch import TransformType, peek_interpreter_stack
from torch.autograd import forward_ad

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
DEVICES = ("cpu", "cuda", "meta")  # AMD GPUs are "cuda" too; meta tensors have no data
MAX_HEAD_DIM = 256

_MODES = torch._C._TorchDispatchModeKey
TRACERS = (_MODES.FAKE, _MODES.FUNCTIONAL, _MODES.PROXY)


def prepare(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Checks q, k, v for the attention kernels and casts them under autocast.

    Returns them with a contiguous last dim. Raises ValueError if the kernels do not take them.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x, None if name == "q" else ("q", q))
        if x.ndim != 4:
            raise ValueError(f"{name}: expected shape [B, H, T, D], got {list(x.shape)}")
    n_batch, n_heads, _, head_dim = q.shape
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"q: expected a head dim of 1 to {MAX_HEAD_DIM}, got {head_dim}")
    if k.shape != v.shape:
        raise ValueError(f"v: expected shape {list(k.shape)} as k has, got {list(v.shape)}")
    if (k.shape[0], k.shape[3]) != (n_batch, head_dim):
        expected = f"[{n_batch}, Hkv, Tk, {head_dim}]"
        raise ValueError(f"k: expected shape {expected} to match q, got {list(k.shape)}")
    if (k.shape[1] == 0) != (n_heads == 0) or n_heads % max(k.shape[1], 1):
        actual = f"{n_heads} and {k.shape[1]}"
        raise ValueError(f"k: expected q's heads to be a multiple of k's, got {actual}")
    refuse_tangents(q, k, v)
    q, k, v = (contiguous_rows(x) for x in _autocast(q, k, v))
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: expected dtype {q.dtype} as q has, got {x.dtype}")
    return q, k, v


def check_tensor(name: str, x: Tensor, like: tuple[str, Tensor] | None = None) -> None:
    """ValueError unless ``x`` is floating point, on a device that operators run on.

    Args:
        like: name and value of the argument whose device ``x`` must share.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.device.type not in DEVICES or (like and x.device != like[1].device):
        wanted = f"{like[1].device} as {like[0]} has" if like else " or ".join(DEVICES)
        raise ValueError(f"{name}: expected device {wanted}, got {x.device}")
    if x.dtype not in DTYPES:
        wanted = ", ".join(map(str, DTYPES))
        raise ValueError(f"{name}: expected dtype one of {wanted}, got {x.dtype}")


def check_video(name: str, x: Tensor, like: tuple[str, Tensor] | None = None) -> None:
    """`check_tensor`, and ValueError unless ``x`` has five dims."""
    check_tensor(name, x, like)
    if x.ndim != 5:
        raise ValueError(f"{name}: expected shape [B, C, T, H, W], got {list(x.shape)}")


def is_traced() -> bool:
    """Whether a trace is under way: torch.compile, fake and functional tensors, make_fx.

    Tensors then have no values to read, and new tensors must not be cached for later calls.
    """
    if torch.compiler.is_compiling():
        return True
    if torch._C._len_torch_dispatch_stack() and any(
        torch._C._get_dispatch_mode(mode) is not None for mode in TRACERS
    ):
        return True
    transform = peek_interpreter_stack()
    return transform is not None and transform.key() == TransformType.Functionalize


def is_int(x: Any) -> bool:
    """True for Python and NumPy integers; not for bools and tensors.

    Symbolic integers may not count: see `is_int_or_symbol`.
    """
    return hasattr(x, "__index__") and not isinstance(x, (bool, Tensor))


def is_int_or_symbol(x: Any) -> bool:
    """`is_int`; under torch.compile True for all but floats and tensors, as ints may be symbols."""
    if torch.compiler.is_compiling():
        return not isinstance(x, (float, Tensor))
    return is_int(x)


def check_number(name: str, x: float, low: float = -math.inf, high: float = math.inf) -> None:
    """ValueError unless ``x`` is a finite number from ``low`` to ``high``."""
    is_number = torch.compiler.is_compiling() or hasattr(x, "__float__")
    if isinstance(x, Tensor) or not (is_number and low <= x <= high and abs(x) < math.inf):
        got = "a tensor" if isinstance(x, Tensor) else x
        expected = "a finite number"
        if high < math.inf:
            expected = f"a number from {low} to {high}"
        elif low > -math.inf:
            expected = f"a finite number of at least {low}"
        raise ValueError(f"{name}: expected {expected}, got {got}")


@overload
def contiguous_rows(x: Tensor) -> Tensor: ...
@overload
def contiguous_rows(x: None) -> None: ...
@overload
def contiguous_rows(x: Tensor | None) -> Tensor | None: ...
def contiguous_rows(x: Tensor | None) -> Tensor | None:
    """``x``, or a copy of it if its last dim is not contiguous, as in ``conv(x).mT``."""
    if x is None or x.shape[-1] <= 1 or x.stride(-1) == 1:
        return x
    return x.contiguous()


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype to cast ``x`` to: autocast's, or its own outside of autocast and for fp64."""
    device = x.device.type
    if device == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def resolve_scale(q: Tensor, softmax_scale: float | None) -> tuple[Tensor, float]:
    """q and a positive scale for the kernels; None stands for ``1 / sqrt(D)``.

    The kernels take the maximum of a row before they scale it, so the scale must be positive. One
    that is not is multiplied into q, and the kernels get 1. The same holds for a scale so small
    that the kernels may round it to 0: an unseen key has the score -inf, and 0 * -inf is NaN.
    """
    if softmax_scale is None:
        return q, q.shape[-1] ** -0.5
    check_number("softmax_scale", softmax_scale)
    scale = float(softmax_scale)
    smallest = torch.finfo(torch.promote_types(q.dtype, torch.float32)).tiny
    return (q, scale) if scale >= smallest else (q * scale, 1.0)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.to(autocast_dtype(x)) for x in tensors)


def refuse_tangents(*tensors: Tensor | None) -> None:
    """NotImplementedError for forward-mode tangents, which operators would silently drop."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError("vidgen operators have no forward-mode derivative")
