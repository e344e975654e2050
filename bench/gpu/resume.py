"""A pytest plugin (``-p bench.gpu.resume``) for a long suite on a rented GPU; `stages.py` uses it.

Tests that passed are noted in the file that ``VIDGEN_PASSED`` names, and do not run again. Test
files whose packages are absent are skipped, with the reason. A worker of pytest-xdist that has lost
the GPU's context would fail all further tests, so it ends and a new one takes its place.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bench.measure import timing

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
FAILED = pytest.StashKey[bool]()
PASSED = pytest.StashKey[list[str]]()


def _file() -> Path:
    return Path(os.environ["VIDGEN_PASSED"])


def pytest_configure(config: pytest.Config) -> None:
    given = getattr(config, "workerinput", None)
    noted = _file().read_text().splitlines() if _file().exists() else []
    config.stash[PASSED] = given["passed"] if given else noted


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node) -> None:
    """All workers have to collect the same tests, also those that start later."""
    node.workerinput["passed"] = node.config.stash[PASSED]


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    report = yield
    error = getattr(report.call.excinfo, "value", None) if report.failed else None
    cause = getattr(error, "__cause__", None)  # pytest raises an error of its own from it
    if isinstance(cause, ModuleNotFoundError):
        report.outcome = "skipped"
        report.longrepr = str(collector.path), None, f"Skipped: {cause}"
    return report


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    passed = set(config.stash[PASSED])
    done = [item for item in items if item.nodeid in passed]
    if done:
        config.hook.pytest_deselected(items=done)
        items[:] = [item for item in items if item.nodeid not in passed]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> None:
    failed_before = item.session.stash.get(FAILED, False)
    if IS_WORKER and failed_before and timing.context_is_lost():
        os._exit(1)  # `item` is reported as failed, and runs again next time
    item.session.stash[FAILED] = False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    report = yield
    item.session.stash[FAILED] = item.session.stash.get(FAILED, False) or report.failed
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # the controller gets the reports of all workers
    if report.when == "call" and report.passed and not IS_WORKER:
        with _file().open("a") as file:
            file.write(report.nodeid + "\n")
