"""A pytest plugin (``-p bench.resume``): tests that have passed are not run again.

They are noted in the file that ``VIDGEN_PASSED`` names. It lets a long suite on a rented GPU go on
where the last run stopped.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ


def _file() -> Path:
    return Path(os.environ["VIDGEN_PASSED"])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    passed = set(_file().read_text().splitlines()) if _file().exists() else set()
    done = [item for item in items if item.nodeid in passed]
    if done:
        config.hook.pytest_deselected(items=done)
        items[:] = [item for item in items if item.nodeid not in passed]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if (
        report.when == "call" and report.passed and not IS_WORKER
    ):  # the controller hears of all of them
        with _file().open("a") as file:
            file.write(report.nodeid + "\n")
