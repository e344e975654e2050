"""Import arrows point down: vidgen, then vidgen_kernels, then torch and Triton."""

import ast
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.portable_only

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kernels/vidgen_kernels"
KERNELS = sorted([*PACKAGE.glob("*.py"), *PACKAGE.glob("portable/*.py")])
INTEGRATIONS = sorted(PACKAGE.glob("integrations/*.py"))
VIDGEN = sorted((ROOT / "vidgen").rglob("*.py"))

FOLDERS = {"kernels", "vidgen", "bench", "tests", "profiling"}
TORCH_ONLY = {"front_door", "intervals", "portable", "reference", "runs", "tokens"}
EAGER = sorted((ROOT / "vidgen/eager").glob("*.py"))
KERNEL_USERS = [ROOT / "vidgen/ops.py", ROOT / "vidgen/verify.py", *EAGER]
MODELS = {"nova", "pyramid_flow", "repvideo"}


def imports(path: Path) -> list[list[str]]:
    """All a file imports, wherever in it, as absolute names in parts; `from a import b` is a.b."""
    package = path.relative_to(ROOT).parts[:-1]
    package = package[1:] if package[0] == "kernels" else package
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            prefix = ".".join([*above, *([node.module] if node.module else [])])
            names += [f"{prefix}.{alias.name}" for alias in node.names]
    return [name.split(".") for name in names]


def packages(path: Path) -> set[str]:
    """The foreign top-level packages a file imports."""
    return {name[0] for name in imports(path)} - sys.stdlib_module_names


def modules(path: Path, package: str) -> set[str]:
    """The modules of one of our packages that a file imports."""
    return {name[1] for name in imports(path) if name[0] == package and len(name) > 1}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [*KERNELS, *INTEGRATIONS], ids=relative)
def test_kernels_need_torch_and_triton_only(path: Path) -> None:
    needs = packages(path) - {"torch", "triton", "vidgen_kernels"}
    # an integration also needs the codebase it patches, but nothing of this repository
    assert not (needs & {"vidgen", "kernels"} if path in INTEGRATIONS else needs)
    assert path in INTEGRATIONS or "integrations" not in modules(path, "vidgen_kernels")


@pytest.mark.parametrize(
    "path", [p for p in KERNELS if {p.stem, p.parent.name} & TORCH_ONLY], ids=relative
)
def test_meaning_does_not_depend_on_triton(path: Path) -> None:
    assert "triton" not in packages(path)
    assert modules(path, "vidgen_kernels") <= TORCH_ONLY


@pytest.mark.parametrize("path", [*KERNELS, *INTEGRATIONS], ids=relative)
def test_only_test_helpers_read_the_reference(path: Path) -> None:
    assert path.stem == "testing" or "reference" not in modules(path, "vidgen_kernels")


@pytest.mark.parametrize("path", VIDGEN, ids=relative)
def test_models_reach_kernels_through_ops(path: Path) -> None:
    assert not packages(path) & {"kernels", "bench", "tests", "profiling"}
    assert "vidgen_kernels" not in packages(path) or path in KERNEL_USERS
    assert "eager" not in modules(path, "vidgen") or path in [ROOT / "vidgen/ops.py", *EAGER]


@pytest.mark.parametrize("model", sorted(MODELS))
def test_models_never_import_each_other(model: str) -> None:
    for path in (ROOT / "vidgen" / model).rglob("*.py"):
        assert not modules(path, "vidgen") & (MODELS - {model}), relative(path)


def test_top_level_folders() -> None:
    visible = {p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")}
    build_output = {"build", "dist", *(name for name in visible if name.endswith(".egg-info"))}
    assert visible - build_output == FOLDERS
