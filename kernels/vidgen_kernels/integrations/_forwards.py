"""Replaces the forward method of a module, also if others wrap it before or after.

Hooks of diffusers and of accelerate put a wrapper into ``module.forward`` and store the method they
wrap. The method is replaced where it is stored, so wrappers keep working and can be removed in any
order. Used by `_acceleration.py`.
"""

from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

from torch import nn


def holders(module: nn.Module) -> Iterator[tuple[Any, str]]:
    """Objects and names of their attributes that may hold the forward method of ``module``."""
    for name in ("forward", "_old_forward"):  # the second is where accelerate keeps it
        if name in vars(module):
            yield module, name
    for reference in getattr(getattr(module, "_diffusers_hook", None), "_fn_refs", ()):
        yield reference, "forward"
        yield reference, "original_forward"


def is_own(module: nn.Module, forward: Any) -> bool:
    """Whether this is the method of the class, and not a replacement."""
    return isinstance(forward, MethodType) and forward == MethodType(type(module).forward, module)


def can_replace(module: nn.Module) -> bool:
    """False where an unknown wrapper hides the method."""
    return "forward" not in vars(module) or any(
        is_own(module, getattr(*holder)) for holder in holders(module)
    )


def replace(module: nn.Module, forward: Callable) -> None:
    """Puts ``forward`` wherever the method of the class is or would be found."""
    assert can_replace(module)
    if "forward" not in vars(module):
        module.forward = forward
    for owner, name in holders(module):
        if is_own(module, getattr(owner, name)):
            setattr(owner, name, forward)


def put_back(module: nn.Module, forward: Callable) -> None:
    """Takes ``forward`` out again, wherever wrappers have moved it since."""
    for owner, name in list(holders(module)):
        if getattr(owner, name) != forward:
            continue
        if owner is module and name == "forward":
            del module.forward
        else:
            setattr(owner, name, MethodType(type(module).forward, module))


def is_replaced_by(module: nn.Module, kind: type) -> bool:
    """Whether a method of an object of ``kind`` has been put in."""
    found = (getattr(*holder) for holder in holders(module))
    return any(isinstance(getattr(forward, "__self__", None), kind) for forward in found)
