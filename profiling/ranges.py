"""Names on the timeline: NVTX ranges around ops ``vidgen::*`` and around the modules of a model.

    with ranges.enabled(model):
        model(x).sum().backward()

Nsight shows and filters them, in the domain ``vidgen`` if the nvtx package is there, else in the default one;
torch.profiler shows them as annotations. Nothing is installed outside the ``with``, so a program pays only for
the ranges it asks for, and torch.compile sees none of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache, partial

import torch
from torch import nn
from torch.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode

DOMAIN = "vidgen"


@cache
def _nvtx() -> tuple[Callable, Callable, Callable, Callable] | None:
    """push(name), pop(), start(name) -> id, end(id); None where PyTorch has no NVTX either."""
    try:
        import nvtx
    except ImportError:
        n = torch.cuda.nvtx
        return (n.range_push, n.range_pop, n.range_start, n.range_end) if torch.version.cuda else None
    domain = nvtx.get_domain(DOMAIN)  # a dummy if no tool is attached

    @cache
    def named(name: str):
        return domain.get_event_attributes(message=name)

    def push(name: str) -> None:
        domain.push_range(named(name))

    def start(name: str):
        return domain.start_range(named(name))

    return push, domain.pop_range, start, domain.end_range


@contextmanager
def region(name: str) -> Iterator[None]:
    """A range on the current thread, the one that launches."""
    nvtx = _nvtx()
    with record_function(name):
        if nvtx:
            nvtx[0](name)
        try:
            yield
        finally:
            if nvtx:
                nvtx[1]()


@contextmanager
def _overlapping(name: str) -> Iterator[None]:
    """A range that need not nest: autograd may start one module before it ends another."""
    nvtx = _nvtx()
    with record_function(name):
        handle = nvtx[2](name) if nvtx else None
        try:
            yield
        finally:
            if nvtx:
                nvtx[3](handle)


class _OpRanges(TorchDispatchMode):
    """Below autograd and, since autograd hands modes on to its threads, in backward too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        ours = func.namespace == DOMAIN
        with region(func._schema.name.split("::")[1]) if ours else nullcontext():
            return func(*args, **(kwargs or {}))


class _ModuleRanges:
    """Hooks that open and close one range per call of a module and pass."""

    def __init__(self, name: str, module: nn.Module):
        opened = {"forward": [], "backward": []}

        def start(make: Callable, stack: list, *_) -> None:
            stack.append(make())
            stack[-1].__enter__()

        def stop(stack: list, *_) -> None:
            if stack:
                stack.pop().__exit__(None, None, None)

        forward, backward = opened.values()
        self.handles = [
            module.register_forward_pre_hook(partial(start, partial(region, name), forward)),
            module.register_forward_hook(partial(stop, forward), always_call=True),
            module.register_full_backward_pre_hook(
                partial(start, partial(_overlapping, f"{name} backward"), backward)
            ),
            module.register_full_backward_hook(partial(stop, backward)),
        ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


@contextmanager
def enabled(model: nn.Module | None = None) -> Iterator[None]:
    """Ranges on, for every op ``vidgen::*`` and for each module of ``model``, by its qualified name."""
    with ExitStack() as stack:
        if model is not None:
            for name, module in model.named_modules():
                ranges = _ModuleRanges(name or type(model).__name__, module)
                stack.callback(ranges.remove)
        stack.enter_context(_OpRanges())
        yield
