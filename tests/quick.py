"""The tests nearest to what changed against main: prints them as arguments for pytest.

    python tests/quick.py                what `make quick` runs
    python tests/quick.py --base HEAD~3  against another commit

Tests mirror the sources folder by folder, so a changed file names the folder of its tests. Where
nothing changed, or what everything rests on, or more than a few rooms, it is a fixed selection that
touches every room; then `make test` has the word.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

ALWAYS = "tests/project"
MOST = 4  # files and folders of tests that fit into two minutes
FIXED = (
    ALWAYS,
    "tests/kernels/attention/test_laws.py",
    "tests/kernels/norms/test_residual_norm.py",
    "tests/kernels/rope",
    "tests/kernels/latents/test_sampler.py",
    "tests/models/repvideo/test_training.py",
    "tests/commands/test_verify.py",
)
# The first prefix that a path begins with says which tests; "" takes the fixed selection.
NEAREST = {
    **{
        f"kernels/vidgen_kernels/{family}/": f"tests/kernels/{family}"
        for family in ("attention", "norms", "rope", "latents", "integrations")
    },
    "kernels/vidgen_kernels/": "",
    **{
        f"vidgen/{model}/": f"tests/models/{model}"
        for model in ("nova", "pyramid_flow", "repvideo")
    },
    "vidgen/cli.py": "tests/commands",
    "vidgen/commands/": "tests/commands",
    "vidgen/common/": "tests/models/common",
    "vidgen/": "",
    "bench/": "tests/bench",
    "profiling/": "tests/profiling",
    "pyproject.toml": "",
    "constraints.txt": "",
}


def changed(base: str) -> list[str]:
    """Paths that differ from where this branch left ``base``, or are new; none outside of git."""
    fork = ["git", "merge-base", base, "HEAD"]
    try:
        (start,) = _lines(fork)
        return [
            *_lines(["git", "diff", "--name-only", start]),
            *_lines(["git", "ls-files", "--others", "--exclude-standard"]),
        ]
    except (OSError, ValueError, subprocess.CalledProcessError):
        return []


def _lines(command: list[str]) -> list[str]:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def nearest(paths: Iterable[str]) -> list[str]:
    """Files and folders of tests, those of the project always among them."""
    found = {ALWAYS}
    for path in paths:
        if path.startswith("tests/"):
            found.add(_of_test_file(path))
        else:
            prefix = next((p for p in NEAREST if path.startswith(p)), None)
            found |= {NEAREST[prefix]} if prefix else set()  # documents are read by ALWAYS
    # a folder stands for what lies in it
    found = {x for x in found if not any(y and x.startswith(f"{y}/") for y in found)}
    return sorted(FIXED if "" in found or not 1 < len(found) <= MOST else found)


def _of_test_file(path: str) -> str:
    """The file itself, the folder of a helper; what all tests use is for the fixed selection."""
    if Path(path).name.startswith("test_") and (ROOT / path).exists():
        return path
    folder = str(Path(path).parent)
    return "" if folder == "tests" or folder.startswith("tests/golden") else folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", default="main", help="default: %(default)s")
    args = parser.parse_args()
    sys.stdout.write(" ".join(nearest(changed(args.base))) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
