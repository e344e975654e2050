"""Turns the command-line options into what a run measures: specs, dtypes and providers.

`conftest.py` defines the options; every ``bench_<suite>.py`` calls `parametrize`.
"""

from __future__ import annotations

from fnmatch import fnmatch
from itertools import product
from typing import Any

import pytest
import torch

from bench.suites import SUITES, Suite, directions

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def parametrize(metafunc: pytest.Metafunc, suite: Suite) -> None:
    config = metafunc.config
    dtypes, providers = chosen_dtypes(config), chosen_providers(config, suite)
    cases = [
        (spec, *case)
        for spec in chosen_specs(config, suite)
        for case in product(dtypes, directions(spec), providers)
    ]
    metafunc.parametrize(
        ("spec", "dtype", "direction", "provider"),
        [pytest.param(*case, id="-".join([case[0].name, *case[1:]])) for case in cases],
    )


def check(config: pytest.Config) -> None:
    """Raises UsageError for a name or pattern that the suites to run do not know."""
    suites = [s for s in SUITES.values() if f"bench_{s.name}.py" in " ".join(config.args)]
    suites = suites or list(SUITES.values())
    patterns = _option(config, "--shapes")
    known = [spec.name for suite in suites for spec in _set(config, suite)]
    if not any(_matches(name, patterns) for name in known):
        raise pytest.UsageError(
            f"--shapes: {patterns} matches none of the shapes: {', '.join(known)}"
        )
    known = list(dict.fromkeys(name for suite in suites for name in suite.providers))
    if unknown := [name for name in _names(config, "--providers") if name not in known]:
        raise pytest.UsageError(
            f"--providers: expected some of {', '.join(known)}; got {', '.join(unknown)}"
        )
    if unknown := [name for name in chosen_dtypes(config) if name not in DTYPES]:
        raise pytest.UsageError(
            f"--dtype: expected some of {', '.join(DTYPES)}; got {', '.join(unknown)}"
        )


def chosen_specs(config: pytest.Config, suite: Suite) -> list[Any]:
    skipped = _names(config, "--skip-shapes")
    patterns = _option(config, "--shapes")
    chosen = [spec for spec in _set(config, suite) if _matches(spec.name, patterns)]
    return [spec for spec in chosen if spec.name not in skipped]


def chosen_dtypes(config: pytest.Config) -> list[str]:
    return _names(config, "--dtype") or ["bf16" if device().type == "cuda" else "fp32"]


def chosen_providers(config: pytest.Config, suite: Suite) -> list[str]:
    """The providers named, in the suite's order, or all that run here by default."""
    wanted = _names(config, "--providers")
    return [
        provider.name
        for provider in suite.providers.values()
        if (provider.name in wanted if wanted else device().type in provider.default_on)
    ]


def _set(config: pytest.Config, suite: Suite) -> tuple[Any, ...]:
    name = _option(config, "--shape-set")
    if name == "auto":
        name = "real" if device().type == "cuda" else "reduced"
        name = "toy" if config.getoption("benchmark_disable") else name
    return suite.sets[name]


def _matches(name: str, patterns: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns.split(","))


def _names(config: pytest.Config, option: str) -> list[str]:
    return [name.strip() for name in _option(config, option).split(",") if name.strip()]


def _option(config: pytest.Config, name: str) -> str:
    return str(config.getoption(name))
