"""Registers launchers as PyTorch operators, with autograd, torch.compile and fake tensors.

`define_op` makes an operator, `Op.register_autograd` makes it differentiable.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch._ops import OpOverload

from .launch import is_interpreted

# `torch.library.custom_op` and `register_autograd` are not used: their checks and flattening at
# every call take longer than a small operator.
LIBRARY = torch.library.Library("vidgen", "FRAGMENT")

_NO_LIST = -1


class Op:
    """An operator ``vidgen::<name>``, called like a function."""

    def __init__(self, name: str, launch: Callable[..., Any], overload: OpOverload):
        self.name = f"vidgen::{name}"
        self.launch = launch
        self.overload = overload

    def __call__(self, *args):
        return self.overload(*args)

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Callable[..., None] | None = None
    ) -> None:
        """Like `torch.library.register_autograd`, lists of tensors included.

        Where the operator takes a list, ``ctx.needs_input_grad`` and the result of ``backward``
        have a list too. If the operator returns a list, ``backward`` gets one list of gradients.
        """
        returns_list = str(self.overload._schema.returns[0].type) == "List[Tensor]"

        def forward(ctx, keyset, lengths, *flat):
            args = _nest(flat, lengths)
            if torch._C._are_functorch_transforms_active():
                with torch.enable_grad():  # `Function` turns it off; outer transforms need it
                    results = self._below_autograd(keyset, args)
            else:
                results = self._below_autograd(keyset, args)
            ctx.lengths = lengths
            ctx.needs_input_grad = _nest(ctx.needs_input_grad[2:], lengths)
            if setup_context is not None:
                setup_context(ctx, args, results)
            return tuple(results) if returns_list else results

        def backward_of_flat(ctx, *grads):
            grads = (list(grads),) if returns_list else grads
            return None, None, *_flatten(backward(ctx, *grads), ctx.lengths)

        name = self.name.split("::")[1]
        members = {"forward": staticmethod(forward), "backward": staticmethod(backward_of_flat)}
        function: Any = type(f"{name}_autograd", (torch.autograd.Function,), members)
        # torch.func calls an operator once per transform, and each call must differentiate for that
        # one alone. `Function.apply` handles all transforms at once, its base class only one.
        apply_at_this_level = super(torch.autograd.Function, function).apply  # pyright: ignore

        def on_autograd(keyset, *args):
            if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
                lengths = tuple([len(x) if isinstance(x, list) else _NO_LIST for x in args])
                flat = _flatten(args, lengths)
                if torch._C._are_functorch_transforms_active():  # one call per transform
                    with enable_single_level_autograd_function():
                        results = apply_at_this_level(keyset, lengths, *flat)
                else:
                    results = function.apply(keyset, lengths, *flat)
                return list(results) if returns_list else results
            return self._below_autograd(keyset, args)

        LIBRARY.impl(name, on_autograd, "Autograd", with_keyset=True)

    def _below_autograd(self, keyset, args):
        # View tracking is off as well: otherwise a result that the operator made as a view could
        # not be written in place.
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return self.overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)


OPS: dict[str, Op] = {}


def define_op(
    name: str,
    launch: Callable[..., Any],
    portable: Callable[..., Any],
    fake: Callable[..., Any],
) -> Op:
    """Defines the operator ``vidgen::<name>`` with one implementation per device.

    Args:
        launch: runs the Triton kernels, on CUDA tensors or interpreted on CPU tensors. Its type
            annotations become the schema.
        portable: computes the same with PyTorch on CPU tensors, same arguments.
        fake: returns empty results with the right shapes, strides and dtypes, same arguments.
    """

    def on_cuda(*args):
        if is_interpreted():
            raise RuntimeError("TRITON_INTERPRET=1 is for CPU tensors: unset it for CUDA tensors")
        with torch.cuda.device_of(next(_tensors(args))):  # Triton launches on the current device
            return OPS[name].launch(*args)

    def on_cpu(*args):
        run = portable
        if is_interpreted():
            _refuse_bf16(name, args)
            run = OPS[name].launch
        if not torch.is_autocast_enabled("cpu"):
            return run(*args)
        with torch.autocast("cpu", enabled=False):  # the caller has already cast the inputs
            return run(*args)

    def no_vmap(info, in_dims, *args):
        # PyTorch would fall back to a slow loop, in which all slices would draw the same noise.
        raise NotImplementedError(f"vidgen::{name} has no vmap: give it the batch as it is")

    LIBRARY.define(name + torch.library.infer_schema(launch, mutates_args=()))
    LIBRARY.impl(name, on_cuda, "CUDA")
    LIBRARY.impl(name, on_cpu, "CPU")
    torch.library.register_fake(f"vidgen::{name}", fake, lib=LIBRARY)
    torch.library.register_vmap(f"vidgen::{name}", no_vmap, lib=LIBRARY)
    OPS[name] = Op(name, launch, getattr(torch.ops.vidgen, name).default)
    return OPS[name]


def _refuse_bf16(name: str, args: Iterable[Any]) -> None:
    """NotImplementedError for bf16: the interpreter treats its bits as integers."""
    dtypes = [x for x in args if isinstance(x, torch.dtype)] + [x.dtype for x in _tensors(args)]
    if torch.bfloat16 in dtypes:
        raise NotImplementedError(
            f"vidgen::{name}: expected fp16, fp32 or fp64 under TRITON_INTERPRET=1, got bfloat16, "
            "which Triton's interpreter computes wrongly"
        )


def refuse_double_backward(backward_op: Op) -> None:
    """Makes a backward through ``backward_op`` raise NotImplementedError."""

    def no_double_backward(ctx, *grads):
        raise NotImplementedError(f"{backward_op.name} has no double backward")

    backward_op.register_autograd(no_double_backward)


def _flatten(args: Sequence[Any], lengths: Sequence[int]) -> list[Any]:
    """Replaces each list by its elements, and None for a list by as many None."""
    flat = []
    for x, n in zip(args, lengths, strict=True):
        if n == _NO_LIST:
            flat.append(x)
        else:
            flat += [None] * n if x is None else x
    return flat


def _nest(flat: Sequence[Any], lengths: Sequence[int]) -> tuple[Any, ...]:
    """The inverse of `_flatten`."""
    remaining = iter(flat)
    return tuple(
        [next(remaining) if n == _NO_LIST else list(islice(remaining, n)) for n in lengths]
    )


def _tensors(args: Iterable[Any]):
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from _tensors(arg)
