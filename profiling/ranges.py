"""Names on the timeline: NVTX ranges around ops ``vidgen::*`` and around the modules of a model.

    with ranges.enabled(model):
        model(x).sum().backward()

Nsight shows them and can filter by them: in the domain ``vidgen`` if the nvtx package is there,
else in the default one. torch.profiler shows them as annotations. Outside the ``with`` there are no
hooks and no modes, so a program pays only for the ranges it asks for.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import nn
from torch.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode

DOMAIN = "vidgen"


class _Nvtx(NamedTuple):
    push: Callable[[str], object]
    pop: Callable[[], object]
    start: Callable[[str], object]
    end: Callable[[object], object]


@cache
def _nvtx() -> _Nvtx:
    try:
        import nvtx
    except ImportError:
        if not torch.version.cuda:  # such a PyTorch has no NVTX, and its functions raise
            return _Nvtx(*[lambda *_: None] * 4)
        library = torch.cuda.nvtx
        return _Nvtx(library.range_push, library.range_pop, library.range_start, library.range_end)
    domain = nvtx.get_domain(DOMAIN)  # a dummy unless a tool is attached
    message = cache(lambda name: domain.get_event_attributes(message=name))
    return _Nvtx(
        lambda name: domain.push_range(message(name)),
        domain.pop_range,
        lambda name: domain.start_range(message(name)),
        domain.end_range,
    )


@contextmanager
def region(name: str) -> Iterator[None]:
    """A range on the current thread, around what it launches."""
    with record_function(name):
        _nvtx().push(name)
        try:
            yield
        finally:
            _nvtx().pop()


@contextmanager
def _overlapping(name: str) -> Iterator[None]:
    """A range that need not be nested: autograd may start one module before it ends another."""
    with record_function(name):
        handle = _nvtx().start(name)
        try:
            yield
        finally:
            _nvtx().end(handle)


class _OpRanges(TorchDispatchMode):
    """Works below autograd, and in backward too, as autograd passes modes on to its threads."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        # Then a model compiles under this mode, and its ranges show when it runs.
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        ours = func.namespace == DOMAIN
        with region(func._schema.name.split("::")[1]) if ours else nullcontext():
            return func(*args, **(kwargs or {}))


@contextmanager
def _module_ranges(name: str, module: nn.Module) -> Iterator[None]:
    """Hooks on one module: a range per call and pass. A stack, as modules may call themselves."""
    forward, backward = [], []

    def start(stack: list, make_range: Callable, range_name: str, *_) -> None:
        stack.append(make_range(range_name))
        stack[-1].__enter__()

    def stop(stack: list, *_) -> None:
        if stack:
            stack.pop().__exit__(None, None, None)

    to_forward = partial(start, forward, region, name)
    to_backward = partial(start, backward, _overlapping, f"{name} backward")
    handles = [
        module.register_forward_pre_hook(to_forward),
        module.register_forward_hook(partial(stop, forward), always_call=True),
        module.register_full_backward_pre_hook(to_backward),
        module.register_full_backward_hook(partial(stop, backward)),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        while backward:  # a backward that raised leaves its ranges open
            stop(backward)


@contextmanager
def enabled(model: nn.Module | None = None) -> Iterator[None]:
    """Ranges for every op ``vidgen::*``, and for each module of ``model`` by its qualified name.

    Modules inside a compiled model stay anonymous, and those whose output is changed in place
    cannot have the backward hooks.
    """
    with ExitStack() as stack:
        if model is not None:
            stack.enter_context(warnings.catch_warnings())
            # The first module always gets this warning, meant for hooks that look at gradients.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            for name, module in model.named_modules():
                stack.enter_context(_module_ranges(name or type(model).__name__, module))
        stack.enter_context(_OpRanges())
        yield
