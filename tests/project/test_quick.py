"""`make quick` runs the tests nearest to a change, and a fixed selection where none is near."""

import pytest

from tests import quick
from tests.paths import ROOT

pytestmark = pytest.mark.portable_only


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        ((), quick.FIXED),
        (("README.md",), quick.FIXED),
        (
            ("kernels/vidgen_kernels/norms/post_norm.py",),
            ("tests/kernels/norms", "tests/project"),
        ),
        (
            ("vidgen/nova/model/vit.py", "tests/models/nova/test_vae.py"),
            ("tests/models/nova", "tests/project"),
        ),
        (
            ("tests/kernels/rope/test_qk_norm_rope.py", "bench/report/report.py"),
            ("tests/bench", "tests/kernels/rope/test_qk_norm_rope.py", "tests/project"),
        ),
        (("tests/aot/pipes.py",), ("tests/aot", "tests/project")),
        (("kernels/vidgen_kernels/common/jit.py",), quick.FIXED),
        (("tests/conftest.py",), quick.FIXED),
        (("vidgen/shapes.py", "vidgen/cli.py"), quick.FIXED),
        ([f"vidgen/{model}/text.py" for model in ("nova", "pyramid_flow")] * 2, None),
    ],
)
def test_nearest_tests(paths: list[str], expected: tuple[str, ...] | None) -> None:
    found = quick.nearest(paths)
    assert found == (sorted(expected) if expected else found)
    assert len(found) <= max(quick.MOST, len(quick.FIXED))


def test_a_change_of_many_rooms_takes_the_fixed_selection() -> None:
    assert quick.nearest(quick.NEAREST) == sorted(quick.FIXED)


def test_what_is_named_exists() -> None:
    for path in (*quick.NEAREST, *filter(None, quick.NEAREST.values()), *quick.FIXED):
        assert (ROOT / path).exists(), path


def test_outside_of_git_nothing_has_changed(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(quick, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert quick.changed("main") == []
