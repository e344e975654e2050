"""RepVideo's feature cache (arXiv 2501.08994): layers read a mix of the outputs before them.

With y the output of the layer before layer i, n the number of outputs in the window, that one
included, and g the gate of layer i:

    total = sum of the n outputs
    h     = g * total / n + (1 - g) * y           what layer i reads, also as its residual

as the released code and checkpoints have it; the paper's equation 8 has g and 1 - g swapped. The
window restarts after layers 0, 6, 12, ...: n is 1 for layers 0 and 1, then 2, 3, 4, 5, 6, 1, ...
For n = 1 the mix is the identity, and the gate has no gradient.

`mix` is that alone; `segment` is all between the MLP of one layer and the attention of the next,
the gated residual before the mix and the norm and modulation after it, in one pass over memory.
Backward keeps the outputs, which training keeps anyway, and sums them again; the running sum is
never kept. `CacheWindow` goes through the layers of a model, `FeatureCache` owns the gates as well.

Shapes: all of y, total, h, x, f, a [B, T, D].
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..common.front_door import DTYPES, check_number, check_tensor, is_int_or_symbol
from .arguments import Modulation, check_like, check_norm
from .residual_norm import Cached, run

WINDOW = 6


class Segment(NamedTuple):
    h: Tensor
    a: Tensor
    total: Tensor | None  # None unless the sum is to be kept
    y: Tensor | None  # None where no gradient will be asked for


def n_entries(layer: int, window: int = WINDOW) -> int:
    """How many outputs the mix before ``layer`` reads."""
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
        total: the sum of the n - 1 outputs before y; gradients reach them through it. With None
            ``older`` is summed, and gradients reach those.
        gate: one element, any floating dtype, on the device of y.
        older: the n - 1 outputs. If given, backward keeps them instead of ``total``.
        keep_sum: whether to return the new sum. The last layer of a window needs none.
        sum_dtype: of the sum; at least as wide as that of y.

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
            `residual_norm`; gate belongs to the layer before, scale and shift to the next one.
        total, cache_gate, n, older, keep_sum, sum_dtype: as total, gate, ... in `mix`.

    Returns:
        h, a, the new total and y. h and y have the dtype of x, a that which autocast asks for.

    Raises:
        ValueError: shapes, dtypes, devices or values that do not fit.
        NotImplementedError: double backward, forward-mode derivatives.
    """
    check_norm(norm)
    check_tensor("x", x)
    cached = None
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
        return Cached(gate, n, list(older), [], sum_dtype, keep_sum)
    check_like("total", total, y)
    kept = [entry.detach() for entry in older]  # gradients go through total
    return Cached(gate, n, [total], kept, sum_dtype, keep_sum)


class _Pass(NamedTuple):
    """Where a forward pass through the layers stands."""

    layer: int = 0  # the one expected next
    older: tuple[Tensor, ...] = ()  # outputs of the window, where gradients will be asked for
    total: Tensor | None = None  # their sum; None: to be summed from them


class CacheWindow:
    """The feature cache of one model: call it before each layer, in order, layer 0 first.

    Works under ``torch.utils.checkpoint(..., use_reentrant=False)`` around single layers, the call
    included, without keeping anything but their inputs: what a layer had before it is looked up by
    the tensor it is called with. Reentrant checkpoints pass copies of it and cannot work.

    Args:
        gates: [L], one for each layer.
        window: how many outputs a mix reads at most.
        sum_dtype: of the running sum, at least as wide as that of the outputs.
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
        """Forgets all; layer 0 begins anew in any case."""
        self._forward = _Pass()
        self._recomputed = _Pass()  # during a backward pass
        # {tensor that a layer was called with: {layer: what it found}}, made when it is needed
        self._found: Any = None

    def __call__(self, layer: int, y: Tensor) -> Tensor:
        """What ``layer`` reads, given the output y of the layer before, or the embedding."""
        state, cached = self._enter(layer, y)
        h, total = mix(y, *cached.pop("args"), **cached)
        self._leave(state, total, y)
        return h

    def segment(
        self, layer: int, x: Tensor, f: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """`segment` before ``layer``: its h and a; options gate ... eps are those of `segment`."""
        state, cached = self._enter(layer, x)
        h, a, total, y = segment(x, f, *cached.pop("args"), **cached, **options)
        self._leave(state, total, y)
        return h, a

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles begin with layer 0."""
        return {name: getattr(self, name) for name in ("gates", "window", "sum_dtype")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.reset()

    def _enter(self, layer: int, key: Tensor) -> tuple[_Pass, dict[str, Any]]:
        """What the layers before have left, and the arguments of `mix` and `segment` from it."""
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
        has_all = len(state.older) == n - 1  # not where some layers ran without gradients
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
        """Whether the next layer reads the same window."""
        return layer + 1 < len(self.gates) and n_entries(layer + 1, self.window) > 1

    def _needs_grad(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and (x.requires_grad or self.gates.requires_grad)


class FeatureCache(nn.Module):
    """`CacheWindow` as a module: ``h = cache(layer, y)`` before each layer of a model.

    Args:
        num_layers: L.
        window: how many outputs a mix reads at most.
        gate: None for a learnable parameter ``gates`` [L] that begins at 0.5, else the fixed gate
            of all layers.
        sum_dtype: of the running sum, at least as wide as that of the outputs.
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
        """What ``layer`` reads, given the output y of the layer before, or the embedding."""
        return self._of_these_gates()(layer, y)

    def segment(
        self, layer: int, x: Tensor, f: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """`segment` before ``layer``: its h and a; options gate ... eps are those of `segment`."""
        return self._of_these_gates().segment(layer, x, f, **options)

    def reset(self) -> None:
        """Forgets all; layer 0 begins anew in any case."""
        self._window.reset()

    def _of_these_gates(self) -> CacheWindow:
        self._window.gates = self.gates  # which moving the module may have replaced
        return self._window


def _is_inside_backward() -> bool:
    """Where a checkpoint runs a part of the forward pass again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
