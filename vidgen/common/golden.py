"""What the models' golden kinds return to `vidgen verify`, beside plain tensors."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Where(NamedTuple):
    """Values that count only where ``compared`` (bool, broadcast to them) is true.

    For rows that nothing reads, such as padding: whatever they hold is right.
    """

    values: Tensor
    compared: Tensor


class Pixels(NamedTuple):
    """uint8 frames, which may be one level apart: their fractions were dropped."""

    values: Tensor


Results = dict[str, Tensor | Where | Pixels]


def check_fixed(config: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """ValueError where a case asks for another value than the one that is built."""
    for name, expected in fixed.items():
        if config.get(name, expected) != expected:
            raise ValueError(f"{name}: expected {expected!r}, got {config[name]!r}")


def flatten(tables: Any, prefix: str = "") -> dict[str, Tensor]:
    """Numbers and lists of numbers in nested dicts and lists, as tensors named by their path."""
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
