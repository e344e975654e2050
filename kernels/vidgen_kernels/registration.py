"""From launchers to operators that autograd, torch.compile and fake tensors know."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from ._triton import is_interpreted

# Not `torch.library.custom_op`: its checks of every call cost more than a small step takes.
LIBRARY = torch.library.Library("vidgen", "FRAGMENT")


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
        torch.library.register_autograd(
            self.name, backward, setup_context=setup_context, lib=LIBRARY
        )


OPS: dict[str, Op] = {}


def define_op(
    name: str,
    launch: Callable[..., Any],
    portable: Callable[..., Any],
    fake: Callable[..., Any],
) -> Op:
    """``vidgen::<name>``, one implementation per device.

    Args:
        launch: runs the Triton kernels: on CUDA tensors, and interpreted on CPU tensors. Its type
            annotations become the schema.
        portable: PyTorch on CPU tensors, same arguments.
        fake: the shapes, strides and dtypes of the results, same arguments.
    """

    def on_cuda(*args):
        if is_interpreted():
            raise RuntimeError("TRITON_INTERPRET=1 is for CPU tensors: unset it for CUDA tensors")
        with torch.cuda.device_of(next(_tensors(args))):  # Triton launches on the current device
            return OPS[name].launch(*args)

    def on_cpu(*args):
        run = OPS[name].launch if is_interpreted() else portable
        if not torch.is_autocast_enabled("cpu"):
            return run(*args)
        with torch.autocast("cpu", enabled=False):  # the caller has cast what is to be cast
            return run(*args)

    def no_vmap(info, in_dims, *args):
        # PyTorch's own way is a slow loop, and one in which all slices would draw the same noise
        raise NotImplementedError(f"vidgen::{name} has no vmap: give it the batch as it is")

    LIBRARY.define(name + torch.library.infer_schema(launch, mutates_args=()))
    LIBRARY.impl(name, on_cuda, "CUDA")
    LIBRARY.impl(name, on_cpu, "CPU")
    torch.library.register_fake(f"vidgen::{name}", fake, lib=LIBRARY)
    torch.library.register_vmap(f"vidgen::{name}", no_vmap, lib=LIBRARY)
    OPS[name] = Op(name, launch, getattr(torch.ops.vidgen, name).default)
    return OPS[name]


def refuse_double_backward(backward_op: Op) -> None:
    def no_double_backward(ctx, *grads):
        raise NotImplementedError(f"{backward_op.name} has no double backward")

    backward_op.register_autograd(no_double_backward)


def _tensors(args: Iterable[Any]):
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from _tensors(arg)
