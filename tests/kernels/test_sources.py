"""What a kernel's text must hold to, because no run here would show it."""

import ast
from pathlib import Path

import pytest

import vidgen_kernels

FILES = sorted(Path(vidgen_kernels.__file__).parent.rglob("*.py"))


@pytest.mark.portable_only
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_masked_loads_say_what_is_outside(path: Path) -> None:
    """The interpreter gives zeros there, a GPU whatever the register held: NaN, for one."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.load":
            names = {keyword.arg for keyword in node.keywords}
            assert "mask" not in names or "other" in names, f"{path.name}:{node.lineno}"
