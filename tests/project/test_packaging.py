"""What the wheel ships, and that the folder `kernels/` leaves that import name to its owner."""

import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from tests.paths import ROOT

pytestmark = pytest.mark.portable_only

SOURCES = [*(ROOT / "kernels").rglob("*.py"), *(ROOT / "vidgen").rglob("*.py")]


def run(*command: str, cwd: Path) -> str:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    tree = tmp_path_factory.mktemp("tree")
    not_code = shutil.ignore_patterns("__pycache__", "golden", "results", "*.egg-info")
    for folder in ("kernels", "vidgen", "bench", "tests", "profiling"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=not_code)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", cwd=tree)
    (path,) = (tree / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_ships_every_module_of_two_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    shipped = [name for name in wheel.namelist() if ".dist-info/" not in name]
    expected = [
        str(p.relative_to(ROOT / "kernels" if "vidgen_kernels" in p.parts else ROOT))
        for p in SOURCES
    ]
    assert sorted(shipped) == sorted(expected)
    assert {name.partition("/")[0] for name in shipped} == {"vidgen", "vidgen_kernels"}


def test_wheel_needs_torch_and_triton_only(wheel: zipfile.ZipFile) -> None:
    (path,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    needs = Parser().parsestr(wheel.read(path).decode()).get_all("Requires-Dist", [])
    core = {need.partition(">=")[0] for need in needs if "extra ==" not in need}
    assert core == {"torch", "triton"}


def test_import_name_kernels_is_not_ours() -> None:
    code = "from importlib.util import find_spec as f; s = f('kernels'); print(s and s.origin)"
    origin = run(sys.executable, "-c", code, cwd=ROOT).strip()
    assert origin == "None" or ROOT / "kernels" not in Path(origin).parents
