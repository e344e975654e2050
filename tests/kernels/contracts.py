"""What the contract tests of all operators share: recorded calls, counted launches, peak memory."""

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor
from triton.runtime.jit import JITFunction

from vidgen.shapes import LatentShape, TokenShape

Inputs = dict[str, Any]  # tensors of a call by name


class Recorder(TorchDispatchMode):
    """Calls of our operators: name -> operator and arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple] = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "vidgen":
            self.calls[op.name()] = (op, args, kwargs or {})
        return op(*args, **(kwargs or {}))


def living_tensors() -> list[Tensor]:
    """All that Python knows, but for what torch.func wraps: that has no storage of its own."""
    gc.collect()
    found = [x for x in gc.get_objects() if type(x) is Tensor]
    return [x for x in found if not torch._C._functorch.is_functorch_wrapped_tensor(x)]


@contextmanager
def launches_are_noted() -> Iterator[list[str]]:
    """Names of the kernels that are launched, interpreted or compiled."""
    names = []
    interpret, run = GridExecutor.__call__, JITFunction.run

    def interpreted(self, *args, **options):
        names.append(self.fn.__name__)
        return interpret(self, *args, **options)

    def compiled(self, *args, **options):
        names.append(self.fn.__name__)
        return run(self, *args, **options)

    with (
        mock.patch.object(GridExecutor, "__call__", interpreted),
        mock.patch.object(JITFunction, "run", compiled),
    ):
        yield names


def peak_bytes(run: Callable[[], object]) -> int:
    """The most memory held at any moment beyond what was held before."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


class PeakMemory(TorchDispatchMode):
    """The most bytes that results of operations held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.holders: Counter[int] = Counter()  # tensors by their storage
        self.bytes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                self.bytes[storage.data_ptr()] = storage.nbytes()
                self.holders[storage.data_ptr()] += 1
                weakref.finalize(x, self.release, storage.data_ptr())
        self.peak = max(self.peak, sum(self.bytes.values()))
        return result

    def release(self, storage: int) -> None:
        self.holders[storage] -= 1
        if not self.holders[storage]:
            self.bytes.pop(storage)


def few_rows(shape: TokenShape | LatentShape) -> TokenShape | LatentShape:
    """A shape of `vidgen.shapes` with rows or planes as long as before, but only some of them."""
    if isinstance(shape, TokenShape):
        return replace(shape, batch=2, text=min(shape.text, 3), video=5)
    return replace(shape, batch=2, channels=2, frames=min(shape.frames, 2))


def leaves_of(inputs: Inputs) -> list[Tensor]:
    return [x for x in tensors_of(inputs) if x.requires_grad]


def tensors_of(inputs: Inputs) -> list[Tensor]:
    return [x for x in tree_leaves(inputs) if isinstance(x, Tensor)]


def upstream_of(outputs: list[Tensor]) -> list[Tensor]:
    rng = torch.Generator().manual_seed(1)
    random = [torch.randn(y.shape, generator=rng, dtype=torch.float64) for y in outputs]
    return [g.to(y) for g, y in zip(random, outputs, strict=True)]


def run(call: Callable[[Inputs], Any], inputs: Inputs) -> list[Tensor]:
    """Outputs, then gradients of all leaves."""
    outputs = [y for y in call(inputs) if y is not None]
    used = [y for y in outputs if y.requires_grad]
    leaves = leaves_of(inputs)
    if not used or not leaves:
        return outputs
    grads = torch.autograd.grad(used, leaves, upstream_of(used), materialize_grads=True)
    return [*(y.detach() for y in outputs), *grads]


def upstream_for(call: Callable[[Inputs], Any], inputs: Inputs) -> list[Tensor]:
    return upstream_of([y for y in call(inputs) if y.requires_grad])


def step(call: Callable[[Inputs], Any], inputs: Inputs, upstream: list[Tensor]) -> list[Tensor]:
    """Nothing but the operator: outputs, and the gradients that there are."""
    outputs = [y for y in call(inputs) if y.requires_grad]
    grads = torch.autograd.grad(outputs, leaves_of(inputs), upstream, allow_unused=True)
    return [*(y.detach() for y in outputs), *(g for g in grads if g is not None)]
