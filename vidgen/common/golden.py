"""Results of golden cases, and helpers for the functions that recompute them.

`vidgen/commands/verify.py` compares the results with the recorded ones.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Where(NamedTuple):
    """Values that are compared only where ``compared`` (bool, broadcast to them) is true.

    For rows that nothing reads, such as padding.
    """

    values: Tensor
    compared: Tensor


class Pixels(NamedTuple):
    """uint8 frames, which may differ by one level, since their fractions were cut off."""

    values: Tensor


Results = dict[str, Tensor | Where | Pixels]


def check_fixed(config: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Raises ValueError if a case asks for another value than the one that we support."""
    for name, expected in fixed.items():
        if config.get(name, expected) != expected:
            raise ValueError(f"{name}: expected {expected!r}, got {config[name]!r}")


def flatten(tables: Any, prefix: str = "") -> dict[str, Tensor]:
    """Numbers, and lists of numbers, in nested dicts and lists, as tensors by dotted path."""
    if isinstance(tables, dict):
        items = tables.items()
    elif isinstance(tables, list) and any(isinstance(x, (dict, list)) for x in tables):
        items = enumerate(tables)
    else:
        return {prefix: torch.tensor(tables)}
    found = {}
    for name, x in items:
        found |= flatten(x, f"{prefix}.{name}" if prefix else str(name))
    return found
