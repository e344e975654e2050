"""Types for argparse: numbers in a range, lists of names, folders for output.

A bad value ends the command before any work.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

MOST = 1_000_000  # the upper limit of options that have no other
MAX_SIDE = 16384  # pixels, the limit of H.264
MAX_STEPS = 1000  # the number of timesteps that the models are trained on
MAX_SEED = 2**63 - 1


def whole(least: int = 1, most: int = MOST, *, multiple: int = 1) -> Callable[[str], int]:
    """A type for whole numbers from ``least`` to ``most``."""
    kind = f"a multiple of {multiple}" if multiple > 1 else "a whole number"

    def read(text: str) -> int:
        try:
            n = int(text)
        except ValueError:
            n = None
        if n is None or not least <= n <= most or n % multiple:
            expected = f"expected {kind} from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{expected}, got {text}")
        return n

    return read


def number(
    least: float = 0.0, most: float = MOST, *, above: bool = False
) -> Callable[[str], float]:
    """A type for numbers from ``least`` to ``most``, with ``above`` without ``least`` itself."""
    start = f"above {least:g}, at most" if above else f"from {least:g} to"

    def read(text: str) -> float:
        try:
            x = float(text)
        except ValueError:
            x = float("nan")
        if not least <= x <= most or (above and x == least):  # NaN is in no range
            expected = f"expected a number {start} {most:g}"
            raise argparse.ArgumentTypeError(f"{expected}, got {text}")
        return x

    return read


def names(text: str) -> str:
    """A type for names separated by commas, none of them empty."""
    if not all(name.strip() for name in text.split(",")):
        raise argparse.ArgumentTypeError(f"expected names with commas between, got {text!r}")
    return text


def output_folder(text: str) -> Path:
    """A type for a folder to write to, which exists or can be created."""
    path = Path(text)
    nearest = next(x for x in (path, *path.absolute().parents) if x.exists())
    try:
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as problem:
        expected = f"expected a folder that can be written, got {text}"
        raise argparse.ArgumentTypeError(f"{expected}: {problem.strerror}") from problem
    return path
