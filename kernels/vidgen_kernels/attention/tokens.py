"""Reads and writes selected tokens of ``[B, H, T, ...]`` tensors, as rows of memory.

`set_masked.py` and `portable.py` use it to sort tokens. PyTorch copies whole rows several times
faster than it gathers single elements. Results have the memory layout of the argument: [B, H, T]
or [B, T, H].
"""

import torch
from torch import Tensor


def select_tokens(x: Tensor, order: Tensor) -> Tensor:
    """``x[b, :, order[b]]``: order is int64 ``[B or 1, N]``, the result ``[B, H, N, ...]``."""
    rows, index = _memory_rows(x, order)
    selected = rows.index_select(0, index)
    if _is_token_major(x):
        return selected.unflatten(0, (len(x), order.shape[1])).transpose(1, 2)
    return selected.unflatten(0, (*x.shape[:2], order.shape[1]))


def put_tokens(out: Tensor, order: Tensor, x: Tensor) -> None:
    """``out[b, :, order[b]] = x[b]``; ``out`` is dense, as `empty_selected` makes it."""
    rows, index = _memory_rows(out, order)
    x = x.transpose(1, 2) if _is_token_major(out) else x
    rows.index_copy_(0, index, x.reshape(-1, *rows.shape[1:]))


def empty_selected(x: Tensor) -> Tensor:
    """Uninitialised, like ``x``, and dense in the layout that `select_tokens` returns."""
    if _is_token_major(x):
        x = x.transpose(1, 2)
        return torch.empty_like(x, memory_format=torch.contiguous_format).transpose(1, 2)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _memory_rows(x: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` as rows of memory, and the indices of the rows that ``order`` selects."""
    if _is_token_major(x):
        x = x.transpose(1, 2)  # [B, T, H, D]: a row is a token of all heads
        first = torch.arange(len(x), device=x.device)[:, None]
        return x.flatten(0, 1), (first * x.shape[1] + order).flatten()
    n_sequences = x.shape[0] * x.shape[1]
    first = torch.arange(n_sequences, device=x.device).view(*x.shape[:2], 1)
    return x.flatten(0, 2), (first * x.shape[2] + order[:, None]).flatten()


def _is_token_major(x: Tensor) -> bool:
    return x.stride(2) > x.stride(1)
