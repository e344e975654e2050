"""What the documents show runs: their Python, the arguments of their commands, files they link."""

import re
import shlex
from pathlib import Path

import pytest

from tests.paths import ROOT
from vidgen import cli
from vidgen.commands import verify

pytestmark = pytest.mark.portable_only

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES += [ROOT / folder / "README.md" for folder in ("kernels", "bench", "profiling")]


def commands(page: Path, program: str) -> list[list[str]]:
    """The words after the name of the program, of its lines in blocks of code."""
    text = page.read_text().replace("\\\n", " ")
    lines = re.findall(rf"^(?: {{4}})?(?:\$ )?{program} (.*)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def test_python_of_the_readme_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        if "pipe" in block:  # a pipeline of diffusers with gigabytes of weights
            compile(block, "README.md", "exec")
        else:
            exec(block, names)
    assert len(blocks) > 4 and "latent" in names


def test_commands_are_understood() -> None:
    found = [words for page in PAGES for words in commands(page, "vidgen")]
    assert len(found) > 8
    for words in found:
        assert cli._parse(words).command == words[0]  # exits where an argument is unknown


def test_make_has_what_is_named() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        text = page.read_text()
        named = set(re.findall(r"(?:`|^    )make ([a-z-]+)", text, re.MULTILINE))
        assert named <= targets, page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_linked_files_exist(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert "://" in link or (page.parent / link).exists(), link


def test_the_number_of_cases() -> None:
    (number,) = re.findall(r"(\d+) recorded cases", README)
    assert int(number) == len(list(verify.find_cases(verify.GOLDEN)))
