"""`vidgen profile`: starts ``profiling/run.py`` of the source tree, which reads the arguments."""

from __future__ import annotations

import argparse
import subprocess
import sys

from vidgen.common.installation import ROOT, require_source, source_environment

PROFILER = ROOT / "profiling" / "run.py"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None: all arguments are passed on, `--help` too."""


def run(args: argparse.Namespace) -> int:
    """The exit status of the script."""
    require_source(PROFILER, "the profiling scripts")
    command = [sys.executable, str(PROFILER), *args.rest]
    return subprocess.run(command, env=source_environment(), check=False).returncode
