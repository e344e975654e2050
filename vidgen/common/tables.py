"""Tables that models need at every step and compute once: positions of tokens, their embeddings."""

import functools
from collections.abc import Callable
from typing import ParamSpec

import torch
from torch import Tensor

from vidgen.ops import is_traced

P = ParamSpec("P")


def kept(table: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """``table`` with its results cached, as there are few of them; arguments are hashable.

    Not while tracing: there they become constants of the graph, or stand for other tensors.
    """

    @functools.lru_cache(maxsize=64)
    def compute(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        with torch.inference_mode(False):  # training may use the cached tensor too
            return table(*args, **kwargs)

    @functools.wraps(table)
    def look_up(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        return table(*args, **kwargs) if is_traced() else compute(*args, **kwargs)

    return look_up
