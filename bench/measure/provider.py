"""`Provider`: an implementation under comparison.

It says why this machine lacks it (`missing`) and why it does not take a case (`refuses`), and turns
a case into a function of the differentiated inputs (`setup`). They are listed in the `providers.py`
of attention, memory and models.
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
    setup: Callable[[Any], Function]  # takes a case of its suite
    missing: Callable[[torch.device], str | None] = never
    refuses: Callable[[Any, bool], str | None] = never  # takes case, backward
    default_on: tuple[str, ...] = ("cpu", "cuda")  # elsewhere only by name
    compiles: bool = False  # worth compiling in parallel before a benchmark


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
    """For `Provider.missing`: needs a CUDA device and the package."""

    def missing(device: torch.device) -> str | None:
        try:
            found = find_spec(import_name) is not None
        except ModuleNotFoundError:  # a parent package is absent
            found = False
        return needs_cuda(device) or (None if found else f"package {name} is not installed")

    return missing
