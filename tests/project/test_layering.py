"""The floor plan of CONTRIBUTING ("Where is what"): what may import what, and how full a room is.

Imports are read from the sources, wherever in a file they stand. `vidgen.cli` loads commands, and
commands load models, by name, so that `vidgen --help` needs no extra: these are no arrows here.
"""

import ast
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.paths import ROOT

pytestmark = pytest.mark.portable_only

PACKAGE = ROOT / "kernels/vidgen_kernels"
FOLDERS = {"kernels", "vidgen", "bench", "tests", "profiling"}
OURS = {"vidgen_kernels", "vidgen", "bench", "profiling", "tests"}
MODELS = ("nova", "pyramid_flow", "repvideo")
FAMILIES = ("attention", "norms", "rope", "latents")


def name_of(path: Path) -> str:
    """The import name of a file: ``vidgen_kernels.rope.portable``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = [p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*.py"))]
FILES = {name_of(path): path for path in PATHS}


@cache
def imports(file: str) -> tuple[str, ...]:
    """All that a file imports, as absolute names; for ``from a import b`` a.b."""
    path = FILES[file]
    package = file.split(".")
    package = package if path.stem == "__init__" else package[:-1]
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            prefix = ".".join([*above, *([node.module] if node.module else [])])
            names += [f"{prefix}.{alias.name}" for alias in node.names]
    return tuple(names)


@cache
def arrows(file: str) -> frozenset[str]:
    """The files of this repository that a file imports."""
    found = set()
    for name in imports(file):
        if name.partition(".")[0] in OURS:
            module = name if name in FILES else name.rpartition(".")[0]
            assert module in FILES, f"{file} imports {name}, which is no file here"
            found.add(module)
    return frozenset(found)


def foreign(file: str) -> set[str]:
    """The top-level packages a file imports that are neither ours nor Python's."""
    return {name.partition(".")[0] for name in imports(file)} - OURS - sys.stdlib_module_names


def below(folder: str) -> list[str]:
    """The files in a folder and its folders, the folder's own ``__init__`` included."""
    return [file for file in FILES if file == folder or file.startswith(f"{folder}.")]


def is_in(file: str, folders: tuple[str, ...]) -> bool:
    return any(file == folder or file.startswith(f"{folder}.") for folder in folders)


def families(*names: str) -> tuple[str, ...]:
    return tuple(f"vidgen_kernels.{name}" for name in names)


def models(*rooms: str) -> tuple[str, ...]:
    return tuple(f"vidgen.{model}.{room}" for model in MODELS for room in rooms)


# Floors from the bottom up; a room may import itself and the rooms named beside it.
ROOMS: dict[str, tuple[str, ...]] = {
    "vidgen_kernels.common": (),
    **{room: families("common") for room in families(*FAMILIES)},
    "vidgen_kernels.feature_cache": families("norms"),
    "vidgen_kernels.integrations": families("common", *FAMILIES, "feature_cache"),
    "vidgen_kernels.reference": (),
    "vidgen_kernels.testing": families("common", *FAMILIES, "reference"),
    "vidgen.eager": ("vidgen_kernels",),
    "vidgen.ops": ("vidgen_kernels", "vidgen.eager"),
    "vidgen.shapes": (),
    "vidgen.common": ("vidgen.ops",),
    **{f"vidgen.{model}": ("vidgen.ops", "vidgen.common") for model in MODELS},
    "vidgen.commands": ("vidgen.ops", "vidgen.common", *models("checks"), "vidgen_kernels.common"),
    "vidgen.cli": ("vidgen.common",),
    "bench.measure": (),
    "bench.report": (),
    **{
        f"bench.{timed}": ("bench.measure", "vidgen", "vidgen_kernels")
        for timed in ("attention", "memory", "models")
    },
    "bench": ("vidgen", "vidgen_kernels", "tests.aot"),
    "profiling": ("bench", "vidgen", "vidgen_kernels"),
}


def room_of(file: str) -> str:
    """The innermost room: `bench.report` before `bench`."""
    rooms = [room for room in ROOMS if is_in(file, (room,))]
    assert rooms, f"expected {file} in a room of the floor plan, it is in none"
    return max(rooms, key=len)


@pytest.mark.parametrize(
    "file", [f for top in sorted(OURS - {"tests"}) for f in below(top) if f not in OURS]
)
def test_a_file_imports_only_what_lies_below_its_room(file: str) -> None:
    room = room_of(file)
    strangers = {x for x in arrows(file) if not is_in(x, (room, *ROOMS[room]))}
    assert not strangers, f"{file} imports {sorted(strangers)}"


def test_no_circle_of_imports() -> None:
    try:
        TopologicalSorter({file: arrows(file) for file in FILES}).prepare()
    except CycleError as circle:
        pytest.fail(" -> ".join(circle.args[1]))


@pytest.mark.parametrize("file", below("vidgen_kernels"))
def test_kernels_need_torch_and_triton_only(file: str) -> None:
    # an integration also needs the codebase it patches
    assert is_in(file, families("integrations")) or foreign(file) <= {"torch", "triton"}


MEANING = (
    "arguments",
    "front_door",
    "intervals",
    "mask_inputs",
    "operands",
    "reference",
    "runs",
    "tokens",
)


@pytest.mark.parametrize(
    "file",
    [
        f
        for f in below("vidgen_kernels")
        if f.split(".")[-1] in MEANING or "portable" in f or f.endswith("_operands")
    ],
)
def test_meaning_and_portable_forms_do_not_depend_on_triton(file: str) -> None:
    reached, todo = set(), [file]
    while todo:
        reached.add(file := todo.pop())
        todo += arrows(file) - reached
    assert [file for file in reached if "triton" in foreign(file)] == []


# The rooms of a model, each with those of the same model that it may import.
MODEL_ROOMS = {
    "model": (),
    "vae": (),
    "sampling": ("model", "text"),
    "training": ("model", "sampling", "text"),
    "checks": ("model", "vae", "sampling", "training", "text", "pipeline", "offload"),
}


@pytest.mark.parametrize("room", MODEL_ROOMS)
@pytest.mark.parametrize("model", MODELS)
def test_rooms_of_a_model(model: str, room: str) -> None:
    allowed = tuple(f"vidgen.{model}.{name}" for name in (room, *MODEL_ROOMS[room]))
    assert below(allowed[0])
    for file in below(allowed[0]):
        strangers = {
            x for x in arrows(file) if is_in(x, (f"vidgen.{model}",)) and not is_in(x, allowed)
        }
        assert not strangers, f"{file} imports {sorted(strangers)}"


@pytest.mark.parametrize(
    ("folder", "pattern", "most"),
    [
        ("bench", "*.py", 10),
        ("tests", "test_*.py", 12),
        *((f"vidgen/{model}", "*.py", 6) for model in MODELS),
        ("vidgen", "*.py", 4),
    ],
)
def test_rooms_are_not_crowded(folder: str, pattern: str, most: int) -> None:
    files = {p.name for p in (ROOT / folder).glob(pattern)} - {"__init__.py"}
    assert len(files) <= most, sorted(files)


def test_top_of_the_kernels() -> None:
    names = {path.name for path in PACKAGE.glob("*.py")}
    assert names == {"__init__.py", "reference.py", "testing.py"}


def test_top_level_folders() -> None:
    visible = {p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")}
    build_output = {"build", "dist", *(name for name in visible if name.endswith(".egg-info"))}
    assert visible - build_output == FOLDERS
