"""RepVideo's feature cache (arXiv 2501.08994): layers read a mix of the outputs of earlier ones.

With y the output of the layer before layer i, n the number of outputs in the window, y included,
and g the gate of layer i:

    total = sum of the n outputs
    h     = g * total / n + (1 - g) * y           the input of layer i, and its residual

This is what the released code and checkpoints compute; equation 8 of the paper has g and 1 - g
swapped. The window restarts after layers 0, 6, 12, ...: n is 1 for layers 0 and 1, then 2, 3, 4, 5,
6, 1, ... For n = 1 the mix is the identity, and the gate gets no gradient.

`mix` computes the mix alone. `segment` computes all between the MLP of one layer and the attention
of the next, in one pass over memory: the gated residual before the mix, and the norm and modulation
after it. For backward the outputs are saved, which training keeps anyway, and summed again; the
running sum is not. `CacheWindow` keeps track of a model's layers, and `FeatureCache` is the same as
a module that owns the gates.

Shapes: all of y, total, h, x, f, a [B, T, D].
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..common.front_door import (
    DTYPES,
    check_number,
    check_tensor,
    contiguous_rows,
    is_int_or_symbol,
)
from .arguments import Modulation, check_like, check_norm
from .residual_norm import NOT_CACHED, Cached, run

WINDOW = 6


class Segment(NamedTuple):
    h: Tensor
    a: Tensor
    total: Tensor | None  # None without `keep_sum`
    y: Tensor | None  # None if no input needs a gradient


def n_entries(layer: int, window: int = WINDOW) -> int:
    """How many outputs the mix before ``layer`` takes."""
    return 1 if layer == 0 else (layer - 1) % window + 1


def mix(
    y: Tensor,  # [B, T, D]
    total: Tensor | None,  # [B, T, D]
    gate: Tensor,
    n: int,
    *,
    older: Sequence[Tensor] = (),
    keep_sum: bool = True,
    sum_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor | None]:
    """``total += y``, then ``h = gate * total / n + (1 - gate) * y``; for n = 1 both are y.

    Args:
        total: the sum of the n - 1 outputs before y, whose gradients flow through it. If it is
            None, ``older`` is summed and gets the gradients.
        gate: one element, any floating dtype, on the device of y.
        older: the n - 1 outputs. If given, they are saved for backward instead of ``total``.
        keep_sum: whether to return the new sum, which the last layer of a window does not need.
        sum_dtype: dtype of the sum, widened to that of y if needed.

    Returns:
        h in the dtype of y, and the new total or None.

    Raises:
        ValueError: shapes, dtypes, devices or values that do not fit.
        NotImplementedError: double backward, forward-mode derivatives.
    """
    check_tensor("y", y)
    if _check_count(n, total, older) == 1:
        return y, y if keep_sum else None
    cached = _cached("y", y, total, gate, n, older, keep_sum, sum_dtype)
    h, _, total, _ = run(y, None, Modulation(), None, 0, cached=cached)
    return h, total


def segment(
    x: Tensor,  # [B, T, D]
    f: Tensor | None,  # [B, T, D]
    total: Tensor | None,  # [B, T, D]
    cache_gate: Tensor,
    n: int,
    *,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    text: Modulation | None = None,
    text_length: int = 0,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-5,
    older: Sequence[Tensor] = (),
    keep_sum: bool = True,
    sum_dtype: torch.dtype = torch.float32,
) -> Segment:
    """``y = x + gate * f``, `mix` of y, then norm and modulation of its h, in one pass.

    Args:
        x, f, gate, scale, shift, text, text_length, weight, bias, norm, eps: as in
            `residual_norm`. The gate is that of the layer before, scale and shift are those of the
            next one.
        total, cache_gate, n, older, keep_sum, sum_dtype: as total, gate, ... in `mix`.

    Returns:
        h, a, the new total and y. h and y have the dtype of x, and a the one that autocast asks
        for, else also that of x.

    Raises:
        ValueError: shapes, dtypes, devices or values that do not fit.
        NotImplementedError: double backward, forward-mode derivatives.
    """
    check_norm(norm)
    check_tensor("x", x)
    cached = NOT_CACHED
    if _check_count(n, total, older) > 1:
        cached = _cached("x", x, total, cache_gate, n, older, keep_sum, sum_dtype)
    own = Modulation(gate, scale, shift)
    h, a, total, y = run(x, f, own, text, text_length, weight, bias, norm, eps, cached)
    assert a is not None
    if n == 1:
        total = h if keep_sum else None
    return Segment(h, a, total, y)


def _check_count(n: int, total: Tensor | None, older: Sequence[Tensor]) -> int:
    if not is_int_or_symbol(n) or n < 1:
        raise ValueError(f"n: expected at least 1 entry, got {n}")
    if n > 1 and total is None and not older:
        raise ValueError(f"total: expected the sum of {n - 1} older entries, or these, got None")
    if older and len(older) != n - 1:
        raise ValueError(f"older: expected {n - 1} entries for n = {n}, got {len(older)}")
    return n


def _cached(
    name: str,
    y: Tensor,
    total: Tensor | None,
    gate: Tensor,
    n: int,
    older: Sequence[Tensor],
    keep_sum: bool,
    sum_dtype: torch.dtype,
) -> Cached:
    check_tensor("gate", gate, (name, y))
    if gate.numel() != 1:
        raise ValueError(f"gate: expected one element, got shape {list(gate.shape)}")
    for i, entry in enumerate(older):
        check_like(f"older[{i}]", entry, y)
    if sum_dtype not in DTYPES:
        wanted = ", ".join(map(str, DTYPES))
        raise ValueError(f"sum_dtype: expected one of {wanted}, got {sum_dtype}")
    sum_dtype = torch.promote_types(sum_dtype, y.dtype)
    if total is None:
        return Cached(gate, n, list(map(contiguous_rows, older)), [], sum_dtype, keep_sum)
    check_like("total", total, y)
    # gradients flow through total instead
    kept = [contiguous_rows(entry.detach()) for entry in older]
    return Cached(gate, n, [contiguous_rows(total)], kept, sum_dtype, keep_sum)


class _Pass(NamedTuple):
    """How far a forward pass has come through the layers."""

    layer: int = 0  # the one expected next
    older: tuple[Tensor, ...] = ()  # outputs of the window that need a gradient
    total: Tensor | None = None  # sum of all outputs of the window; None: sum `older` instead


class CacheWindow:
    """The feature cache of one model: call it before each layer, in order, layer 0 first.

    It works under ``torch.utils.checkpoint(..., use_reentrant=False)`` around single layers and
    their call of the cache, and nothing but the inputs of the layers is kept: a recomputed layer
    finds its state by the tensor that it was called with. Reentrant checkpoints call with copies of
    that tensor, and raise RuntimeError.

    Args:
        gates: [L], one for each layer.
        window: how many outputs a mix takes at most.
        sum_dtype: dtype of the running sum, widened to that of the outputs if needed.
    """

    def __init__(
        self, gates: Tensor, window: int = WINDOW, sum_dtype: torch.dtype = torch.float32
    ) -> None:
        if not isinstance(gates, Tensor):
            raise ValueError(f"gates: expected a tensor, got {type(gates).__name__}")
        if gates.ndim != 1 or len(gates) == 0:
            raise ValueError(f"gates: expected shape [layers], got {list(gates.shape)}")
        if not is_int_or_symbol(window) or window < 1:
            raise ValueError(f"window: expected at least 1 layer, got {window}")
        self.gates, self.window, self.sum_dtype = gates, window, sum_dtype
        self.reset()

    def reset(self) -> None:
        """Forgets all layers. Calling layer 0 does the same."""
        self._forward = _Pass()
        self._recomputed = _Pass()  # during a backward pass
        # {tensor that a layer was called with: {layer: state before it}}, created on first use
        self._found: Any = None

    def __call__(self, layer: int, y: Tensor) -> Tensor:
        """The input of ``layer``, from the output of the layer before or the embedding."""
        state, cached = self._enter(layer, y)
        h, total = mix(y, *cached.pop("args"), **cached)
        self._leave(state, total, y)
        return h

    def segment(
        self, layer: int, x: Tensor, f: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """h and a of `segment` before ``layer``; ``options`` are its arguments gate to eps."""
        state, cached = self._enter(layer, x)
        h, a, total, y = segment(x, f, *cached.pop("args"), **cached, **options)
        self._leave(state, total, y)
        return h, a

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start at layer 0."""
        return {name: getattr(self, name) for name in ("gates", "window", "sum_dtype")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.reset()

    def _enter(self, layer: int, key: Tensor) -> tuple[_Pass, dict[str, Any]]:
        """The state before ``layer``, and the arguments of `mix` and `segment` it gives."""
        if not 0 <= layer < len(self.gates):
            raise ValueError(f"layer: expected 0 to {len(self.gates) - 1}, got {layer}")
        is_recomputed = _is_inside_backward()
        state = self._recomputed if is_recomputed else self._forward
        if is_recomputed and self._found is not None:
            state = self._found.get(key, {}).get(layer, state)
        if layer == 0:
            state = _Pass()
        if layer != state.layer and is_recomputed:
            raise RuntimeError(
                f"layer {layer} is recomputed with a tensor it was not called with before: "
                "checkpoint layers with use_reentrant=False"
            )
        if layer != state.layer:
            raise ValueError(f"layer: expected {state.layer}, or 0 to begin anew, got {layer}")
        n = n_entries(layer, self.window)
        if n == 1:
            state = _Pass(layer)
        has_all = len(state.older) == n - 1  # False if some outputs need no gradient
        older = state.older if has_all else ()
        if not is_recomputed and self._needs_grad(key) and not torch.compiler.is_compiling():
            if self._found is None:
                self._found = WeakTensorKeyDictionary()
            found = _Pass(layer, older, None if has_all else state.total)
            self._found.setdefault(key, {})[layer] = found
        args = state.total, self.gates[layer], n
        keep_sum = self._is_continued(layer)
        return state, {
            "args": args, "older": older, "keep_sum": keep_sum, "sum_dtype": self.sum_dtype
        }  # fmt: skip

    def _leave(self, state: _Pass, total: Tensor | None, y: Tensor | None) -> None:
        older = (*state.older, y) if y is not None and self._needs_grad(y) else state.older
        after = _Pass(state.layer + 1, older, total)
        if not self._is_continued(state.layer):
            after = _Pass(state.layer + 1)
        if _is_inside_backward():
            self._recomputed = after
        else:
            self._forward = after

    def _is_continued(self, layer: int) -> bool:
        """Whether the next layer still belongs to the window of ``layer``."""
        return layer + 1 < len(self.gates) and n_entries(layer + 1, self.window) > 1

    def _needs_grad(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and (x.requires_grad or self.gates.requires_grad)


class FeatureCache(nn.Module):
    """`CacheWindow` as a module: ``h = cache(layer, y)`` before each layer of a model.

    Args:
        num_layers: L.
        window: how many outputs a mix takes at most.
        gate: the fixed gate of all layers; None for a learnable parameter ``gates`` [L], at first
            0.5.
        sum_dtype: as in `CacheWindow`.
    """

    gates: Tensor

    def __init__(
        self,
        num_layers: int,
        *,
        window: int = WINDOW,
        gate: float | None = None,
        sum_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if not is_int_or_symbol(num_layers) or num_layers < 1:
            raise ValueError(f"num_layers: expected at least 1, got {num_layers}")
        if gate is not None:
            check_number("gate", gate)
        gates = torch.full((num_layers,), 0.5 if gate is None else float(gate))
        if gate is None:
            self.gates = nn.Parameter(gates)
        else:
            self.register_buffer("gates", gates, persistent=False)
        self._window = CacheWindow(gates, window, sum_dtype)

    def forward(self, layer: int, y: Tensor) -> Tensor:
        """The input of ``layer``, from the output of the layer before or the embedding."""
        return self._window_with_gates()(layer, y)

    def segment(
        self, layer: int, x: Tensor, f: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """h and a of `segment` before ``layer``; ``options`` are its arguments gate to eps."""
        return self._window_with_gates().segment(layer, x, f, **options)

    def reset(self) -> None:
        """Forgets all layers. Calling layer 0 does the same."""
        self._window.reset()

    def _window_with_gates(self) -> CacheWindow:
        self._window.gates = self.gates  # moving the module may have replaced them
        return self._window


def _is_inside_backward() -> bool:
    """Whether a checkpoint is recomputing a part of the forward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
