"""What every test gets: fixed seeds, memory that starts as NaN, a device, a skip without a GPU."""

import os
import random

# cuBLAS asks for a fixed workspace before it calls itself deterministic; read when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if INTERPRETED:
        reason = "GPU tests run compiled kernels, this process interprets them"
    elif not torch.cuda.is_available():
        reason = "no CUDA device"
    else:
        reason = None
    for item in items:
        if item.get_closest_marker("gpu"):
            # torch warns of TF32 left unused, of a prototype that finds synchronisation, and more
            item.add_marker(pytest.mark.filterwarnings("default"))
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    """The same numbers every time; ``torch.empty`` holds NaN, so an element never written shows."""
    random.seed(0)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return "cuda" if request.node.get_closest_marker("gpu") else "cpu"
