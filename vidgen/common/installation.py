"""Which parts of the project are installed: the source tree, and the packages of each extra.

Commands check here before they start. Nothing in this file imports torch or an extra.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"  # in the source tree only, not in the wheel

# The modules that each extra brings. A module that several extras bring is asked of the first.
EXTRAS = {
    "models": (
        *("diffusers", "transformers", "safetensors", "sentencepiece", "google.protobuf"),
        *("av", "rich", "matplotlib"),
    ),
    "bench": ("pytest", "pytest_benchmark", "rich", "matplotlib", "markdown_it", "safetensors"),
    "profiling": ("nvtx",),
    "peers": ("flash_attn", "liger_kernel", "natten", "xformers"),
}


class CommandError(Exception):
    """A problem that the user can solve, in one line; `vidgen` prints it without a traceback."""


def absent(modules: Sequence[str]) -> list[str]:
    """The modules that are not installed."""

    def is_found(name: str) -> bool:
        try:
            return find_spec(name) is not None
        except ModuleNotFoundError:  # the package around it is not installed either
            return False

    return [name for name in modules if not is_found(name)]


def require_extra(extra: str) -> None:
    """Raises CommandError unless all modules of an extra are installed."""
    if missing := absent(EXTRAS[extra]):
        raise CommandError(f"needs {', '.join(missing)}: pip install 'vidgen-kernels[{extra}]'")


def require_source(path: Path, what: str) -> None:
    """Raises CommandError unless ``path``, a part of the source tree, is there."""
    if not path.exists():
        raise CommandError(
            f"{what} are not part of the installed package: get the source with `git clone` "
            "and run this command there"
        )


def source_environment() -> dict[str, str]:
    """The environment in which scripts of the source tree find both packages."""
    paths = [str(ROOT / "kernels"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
    }
