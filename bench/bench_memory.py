"""Operators bound by memory: ours against PyTorch's, over cases x dtypes x directions x providers.

Work is the bytes that must move once; peak is the bandwidth of a large copy in the same run.
"""

from __future__ import annotations

import pytest

from bench import options
from bench.memory.registry import MemoryCase
from bench.suites import MEMORY
from vidgen.shapes import Direction


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options.parametrize(metafunc, MEMORY)


def test_memory(
    spec: MemoryCase, dtype: str, direction: Direction, provider: str, measured, record
) -> None:
    outcome = measured(MEMORY, spec, dtype, backward=direction != "fwd")[provider]
    labels = {"op": spec.op, "shape": spec.name, "direction": direction, "provider": provider}
    n_bytes = spec.floor(options.DTYPES[dtype]).of(direction)
    record(outcome, labels, dtype, {"gbps": n_bytes / 1e9}, model=spec.shape.model)
