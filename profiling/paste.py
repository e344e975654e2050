"""Puts the real output of commands into a document.

    python profiling/paste.py profiling/README.md

The command of every block that begins with ``    $ command`` is run, and what it prints replaces
the lines below it, cut to `WIDTH` columns and `LINES` lines.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 110  # columns kept
LINES = 20
BLOCK = re.compile(r"^    \$ (?P<command>.+)\n(?:    .*\n)*", re.MULTILINE)
NOISE = re.compile(r"^(USDT|\[W)|^[\s-]+$|^/tmp/")  # libraries, rules of tables, file names


def commands(text: str) -> list[str]:
    return [match["command"] for match in BLOCK.finditer(text)]


def output(command: str) -> list[str]:
    """What a command prints, without libraries' noise. Raises CalledProcessError if it fails."""
    program, _, arguments = command.partition(" ")
    words = {"vidgen": f"{sys.executable} -m vidgen.cli", "python": sys.executable}[program]
    line = f"{words} {arguments}"
    done = subprocess.run(line, shell=True, cwd=ROOT, capture_output=True, text=True, check=True)
    # without the paths of this machine
    text = done.stdout.replace(sys.executable, "python").replace(f"{ROOT}/", "")
    lines = [line.rstrip() for line in text.splitlines()]
    kept = [line for line in lines if line and not NOISE.match(line)][:LINES]
    return [part for line in kept for part in _fit(line)]


def _fit(line: str) -> list[str]:
    """Tables lose their last columns, other lines are folded."""
    is_table = line.startswith("|") or "   " in line.strip()
    if is_table:
        return [line[:WIDTH].rstrip()]
    return textwrap.wrap(line, WIDTH, subsequent_indent="    ", break_on_hyphens=False)


def pasted(text: str) -> str:
    def renew(match: re.Match) -> str:
        lines = [f"$ {match['command']}", *output(match["command"])]
        return "".join(f"    {line}\n" for line in lines)

    return BLOCK.sub(renew, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("document", type=Path)
    args = parser.parse_args()
    text = args.document.read_text()
    for command in commands(text):
        print(command, file=sys.stderr)
    whole = pasted(text)  # the document stays as it is if a command fails
    args.document.write_text(whole)
    return 0


if __name__ == "__main__":
    sys.exit(main())
