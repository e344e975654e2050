"""`vidgen info`: versions, the device, what each extra lacks, and the providers of benchmarks."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from importlib import metadata

import torch

from vidgen.common.installation import BENCH, EXTRAS, absent, source_environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def run(args: argparse.Namespace) -> int:
    """Prints one fact a line; 0 unless the providers cannot be listed."""
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    facts = {
        "vidgen-kernels": _version("vidgen-kernels"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "gpu": _describe_gpu(),
        "interpreter": "on" if is_interpreted else "off (TRITON_INTERPRET=1)",
    }
    for extra, modules in EXTRAS.items():
        missing = absent(modules)
        facts[f"extra {extra}"] = f"without {', '.join(missing)}" if missing else "complete"
    for name, fact in facts.items():
        print(f"{name:16} {fact}")
    if not (BENCH / "report" / "report.py").exists():
        print("benchmarks       in the source tree only, not in the wheel")
        return 0
    print("benchmark providers", flush=True)
    command = [sys.executable, str(BENCH / "suites.py")]
    return subprocess.run(command, env=source_environment(), check=False).returncode


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "source tree, not installed"


def _describe_gpu() -> str:
    if not torch.cuda.is_available():
        return "none: CPU tensors take the portable PyTorch implementation"
    found = torch.cuda.get_device_properties(0)
    memory = found.total_memory / 2**30
    return (
        f"{found.name}, sm_{found.major}{found.minor}, {memory:.0f} GiB, CUDA {torch.version.cuda}"
    )
