"""Where results are kept, and how their files are written."""

from __future__ import annotations

import os
import re
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "results"


def folder_name(gpu: str) -> str:
    """``nvidia-h200`` for ``NVIDIA H200``: the name of a GPU's folder in `RESULTS`."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def write(path: Path, text: str) -> None:
    """Writes the whole file or nothing, so that a run that is cut short leaves no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
