"""What operators take and return, and what their launchers, CPU forms and fakes make of it.

An operator takes its arguments one by one, up to 24 here. The functions behind it take them as one
NamedTuple, and `flat` turns each into a function of the single fields.

An operator returns tensors, never None. Where a result was not asked for it returns an empty
vector, `absent`, which `none_if_absent` turns back into None. No other result is a vector.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def flat(function: Callable[[Any], Any]) -> Callable[..., Any]:
    """``function(args)``, where ``args`` is a NamedTuple, as a function of its fields."""
    signature = inspect.signature(function)
    (parameter,) = signature.parameters.values()
    operands = parameter.annotation

    def call(*fields):
        return function(operands._make(fields))

    # what the operator's schema is inferred from
    call.__signature__ = inspect.signature(operands).replace(
        return_annotation=signature.return_annotation
    )
    return call


def absent(like: Tensor) -> Tensor:
    """What an operator returns in place of None."""
    return like.new_empty(0)


def none_if_absent(x: Tensor) -> Tensor | None:
    return None if x.ndim == 1 else x


def accumulator(x: Tensor, *others: Tensor) -> torch.dtype:
    """The dtype of statistics and sums: fp32, or fp64 if a tensor has it."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    for other in others:
        dtype = torch.promote_types(dtype, other.dtype)
    return dtype
