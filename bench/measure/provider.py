"""What an implementation under comparison says of itself.

Why this machine lacks it (`missing`), why it does not do a case (`refuses`), and how it turns a
case into a function of the differentiated inputs (`setup`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from bench.measure.case import Function


def never(*_) -> None:
    return None


@dataclass(frozen=True)
class Provider:
    name: str
    summary: str
    setup: Callable[[Any], Function]  # of a case of its suite
    missing: Callable[[torch.device], str | None] = never
    refuses: Callable[[Any, bool], str | None] = never  # case, backward
    default_on: tuple[str, ...] = ("cpu", "cuda")  # elsewhere it has to be asked for by name
    compiles: bool = False  # ahead of a benchmark, in parallel


def as_table(*providers: Provider) -> dict[str, Provider]:
    return {provider.name: provider for provider in providers}


def needs_16_bits(case, backward: bool) -> str | None:
    if case.dtype in (torch.float16, torch.bfloat16):
        return None
    return f"takes float16 and bfloat16, not {str(case.dtype).removeprefix('torch.')}"


def needs_cuda(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "needs a CUDA device"


def needs_compiler(device: torch.device) -> str | None:
    if device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return "torch.compile needs a C++ compiler"
    return None


def package(name: str, import_name: str) -> Callable[[torch.device], str | None]:
    """Missing without a CUDA device, or without the package."""

    def missing(device: torch.device) -> str | None:
        try:
            found = find_spec(import_name) is not None
        except ModuleNotFoundError:  # of the package that should hold it
            found = False
        return needs_cuda(device) or (None if found else f"package {name} is not installed")

    return missing
