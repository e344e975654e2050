"""What a run measures: the command-line options, as shapes, dtypes and providers."""

from __future__ import annotations

from fnmatch import fnmatch

import pytest
import torch

from bench import providers
from vidgen.shapes import SETS, AttentionShape

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def chosen_shapes(config: pytest.Config) -> list[AttentionShape]:
    """Raises UsageError where a pattern matches nothing."""
    name = config.getoption("--shape-set")
    if name == "auto":
        name = "real" if device().type == "cuda" else "reduced"
        name = "toy" if config.getoption("benchmark_disable") else name
    patterns = config.getoption("--shapes").split(",")
    skipped = config.getoption("--skip-shapes").split(",")
    shapes = [s for s in SETS[name] if any(fnmatch(s.name, p) for p in patterns)]
    if not shapes:
        known = ", ".join(s.name for s in SETS[name])
        raise pytest.UsageError(
            f"--shapes: {','.join(patterns)} matches none of the {name} shapes: {known}"
        )
    return [s for s in shapes if s.name not in skipped]


def chosen_dtypes(config: pytest.Config) -> list[str]:
    names = config.getoption("--dtype") or ("bf16" if device().type == "cuda" else "fp32")
    unknown = [name for name in names.split(",") if name not in DTYPES]
    if unknown:
        raise pytest.UsageError(
            f"--dtype: expected some of {', '.join(DTYPES)}; got {', '.join(unknown)}"
        )
    return names.split(",")


def chosen_providers(config: pytest.Config) -> list[str]:
    try:
        return [p.name for p in providers.select(config.getoption("--providers"))]
    except ValueError as error:
        raise pytest.UsageError(f"--providers: {error}") from None
