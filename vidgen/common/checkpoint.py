"""Checkpoint files: reads them safely, loads all weights or none, writes whole files or none."""

from __future__ import annotations

import codecs
import json
import os
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

# Names of the weights in a folder; the first one that exists is read. An index names several files.
FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
)
# The same with the name of a variant in it, such as fp16, in the places where diffusers puts it.
VARIANTS = (
    "diffusion_pytorch_model.*.safetensors",
    "diffusion_pytorch_model.safetensors.index.*.json",
    "diffusion_pytorch_model.*.safetensors.index.json",
    "diffusion_pytorch_model.*.bin",
    "diffusion_pytorch_model.bin.index.*.json",
)
# What DistributedDataParallel, torch.compile, PEFT and training scripts put before names.
WRAPPERS = ("module.", "_orig_mod.", "base_model.model.", "transformer.")
SHOWN = 5  # the most keys that an error names
UNSAFE = re.compile(r"GLOBAL (\S+) was not an allowed global")  # as torch says it


def read_state_dict(path: str | Path, within: str | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, of several files with an index, or of a torch file.

    No code in a file is executed: torch files are read with ``weights_only=True``; they may hold
    NumPy's arrays as well. A prefix that a wrapper gave to all names is removed.

    Args:
        within: the entry of a training checkpoint that holds the tensors, if it is there.

    Raises:
        ValueError: a missing file, or one without tensors.
    """
    path = Path(path)
    if ".index." in path.name and path.suffix == ".json":
        state = {}
        for name in _files_of(path):
            state |= _read_file(path.parent / name)
    else:
        state = _read_file(path)
    if isinstance(state, dict) and within is not None and within in state:
        state = state[within]
    if not isinstance(state, dict):
        raise ValueError(
            f"checkpoint: expected tensors by name in {path}, got {type(state).__name__}"
        )
    return _unwrapped(state)


def _read_file(path: Path) -> Any:
    """What is in a file of safetensors or of torch."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    try:
        with torch.serialization.safe_globals(_numpy_globals()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, UnpicklingError) as problem:
        met = UNSAFE.search(str(problem))
        # the rest of torch's message tells how to read a file that one trusts
        what = str(problem).partition(". ")[0]
        what = f"it holds {met[1]}, which could run code and is not loaded" if met else what
        raise ValueError(f"checkpoint: expected tensors in {path}: {what}") from problem


def _numpy_globals() -> list[Any]:
    """What pickled arrays and numbers of NumPy name: trainers keep its random state."""
    import numpy as np

    makers: list[Any] = [x.__reduce__()[0] for x in (np.zeros(0), np.float64(0))]
    named = [
        (make, f"numpy.{core}.multiarray.{make.__name__}")
        for make in makers
        for core in ("core", "_core")  # of NumPy 1 and 2
    ]
    kinds = np.typecodes["All"]
    return [*named, np.ndarray, np.dtype, *{type(np.dtype(x)) for x in kinds}, codecs.encode]


def _unwrapped(state: dict[str, Any]) -> dict[str, Any]:
    """Without the prefixes that wrappers gave to all names, and those of compiled blocks within."""

    def wrapper() -> str:
        keys = [str(key) for key in state]
        return next((w for w in WRAPPERS if keys and all(k.startswith(w) for k in keys)), "")

    while prefix := wrapper():
        state = {key.removeprefix(prefix): x for key, x in state.items()}
    return {
        key.replace("._orig_mod.", ".") if isinstance(key, str) else key: x
        for key, x in state.items()
    }


def _files_of(index: Path) -> list[str]:
    """The files that an index names, which have to be in its folder."""
    names = read_config(index.parent, index.name).get("weight_map")
    files = set(map(str, names.values())) if isinstance(names, dict) else set()
    if not files or any(Path(name).name != name for name in files):
        expected = f"expected a weight_map of files beside it in {index}"
        raise ValueError(f"{index.name}: {expected}, got {names!r:.80}")
    return sorted(files)


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file. Raises ValueError if it is missing or no safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as problem:
        raise ValueError(f"file: expected safetensors in {path}: {problem}") from problem


def read_folder(
    folder: str | Path, within: str | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and state dict of a folder in the layout of diffusers.

    Raises:
        ValueError: a missing config.json or missing weights.
    """
    folder = Path(folder)
    config = read_config(folder)
    return config, read_state_dict(_weights_in(folder), within)


def _weights_in(folder: Path) -> Path:
    for name in FILES:
        if (folder / name).exists():
            return folder / name
    for pattern in VARIANTS:
        # shards are found by their index
        found = sorted(path for path in folder.glob(pattern) if "-of-" not in path.name)
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise ValueError(f"folder: expected weights of one variant in {folder}, got {names}")
        if found:
            return found[0]
    raise ValueError(f"folder: expected {' or '.join(FILES)} in {folder}, found none")


def read_config(folder: str | Path, name: str = "config.json") -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError if it is missing or holds no object."""
    path = Path(folder) / name
    if not path.is_file():
        raise ValueError(f"folder: expected {name} in {folder}, found none")
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{name}: expected an object in {path}, got {type(config).__name__}")
    return config


def read_json(path: Path) -> Any:
    """The contents of a JSON file. Raises ValueError if it is not JSON."""
    try:
        return json.loads(path.read_text())
    except ValueError as problem:
        raise ValueError(f"{path.name}: expected JSON in {path}: {problem}") from problem


def load_exactly(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    prefix: str = "",
    skip: Sequence[str] = (),
) -> None:
    """Loads ``state`` into ``model``, whose keys have to be the same.

    A model on the meta device takes over the tensors of ``state``, with their dtype.

    Args:
        prefix: removed from the keys that begin with it. A prefix that all keys share is removed
            too, if the model then has all of them.
        skip: keys that begin with one of these are ignored.

    Raises:
        ValueError: missing or unknown keys, or other shapes.
    """
    found = {
        key.removeprefix(prefix): x for key, x in state.items() if not key.startswith(tuple(skip))
    }
    expected = model.state_dict()
    found = without_common_prefix(found, expected)
    problems = [
        _named(keys, problem)
        for problem, keys in (
            ("missing", expected.keys() - found.keys()),
            ("left over", found.keys() - expected.keys()),
        )
        if keys
    ]
    if problems:
        raise ValueError(
            f"checkpoint: expected the {len(expected)} keys of {type(model).__name__}, "
            f"got {'; '.join(problems)}"
        )
    for key, x in expected.items():
        if found[key].shape != x.shape:
            raise ValueError(
                f"checkpoint: expected {key} of shape {list(x.shape)}, "
                f"got {list(found[key].shape)}; is config.json of another size?"
            )
    model.load_state_dict(found, assign=any(x.is_meta for x in expected.values()))


def without_common_prefix(
    state: Mapping[str, Tensor], expected: Collection[str]
) -> dict[str, Tensor]:
    """``state`` without a prefix that all its keys share, if then all of them are expected."""
    prefix, parts = "", [key.split(".")[:-1] for key in state]
    for part, *others in zip(*parts, strict=False):
        if any(other != part for other in others):
            break
        prefix += f"{part}."
        bare = {key.removeprefix(prefix): x for key, x in state.items()}
        if bare.keys() <= set(expected):
            return bare
    return dict(state)


def _named(keys: Collection[str], problem: str) -> str:
    names = ", ".join(sorted(keys)[:SHOWN])
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return f"{len(keys)} {problem}: {names}{more}"


def write_state_dict(path: str | Path, state: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file, whole or not at all. Raises ValueError if ``path`` exists."""
    from safetensors.torch import save_file

    with written_whole(path) as unfinished:
        save_file({key: x.detach().contiguous().cpu() for key, x in state.items()}, unfinished)


def check_new(path: Path, kind: str = "file") -> None:
    """Raises ValueError unless a new file or folder can be created at ``path``.

    Commands call this before long work.
    """
    if os.path.lexists(path):  # also a broken link
        raise ValueError(f"output: expected a new {kind}, {path} exists")
    if not path.parent.is_dir():
        raise ValueError(f"output: expected an existing folder, got {path.parent}")
    try:
        tempfile.NamedTemporaryFile(**_beside(path)).close()
    except OSError as problem:
        expected = f"expected a name and a folder that can be written, got {path}"
        raise ValueError(f"output: {expected}: {problem.strerror}") from problem


def _beside(path: Path) -> dict[str, Any]:
    """Arguments of `tempfile` for a temporary file in the same folder."""
    return {"dir": path.parent, "prefix": f".{path.stem}-", "suffix": path.suffix}


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """A temporary file in the same folder, which is renamed to ``path`` at the end of the context.

    Raises:
        ValueError: ``path`` exists, or its folder does not.
        OSError: the file is finished, but cannot be renamed; it is kept (`publish`).
    """
    path = Path(path)
    check_new(path)
    handle, name = tempfile.mkstemp(**_beside(path))
    os.close(handle)
    unfinished = Path(name)
    try:
        yield unfinished
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    publish(unfinished, path)


def publish(finished: Path, path: Path) -> None:
    """Renames a finished file or folder to ``path``, on the same disk, and overwrites nothing.

    Raises:
        OSError: it cannot be renamed, or ``path`` exists by now; it is kept, and the message says
            where.
    """
    try:
        if finished.is_dir():
            finished.rename(path)  # onto a folder with files in it this fails
            return
        _share(finished)
        try:
            os.link(finished, path)  # unlike a rename it fails where path exists
        except FileExistsError:
            raise
        except OSError:  # a disk without links: the name is taken, then written over
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
            try:
                finished.rename(path)
            except OSError:
                path.unlink()
                raise
        else:
            finished.unlink()
    except OSError as problem:
        reason = f"could not write {path}: {problem.strerror}"
        raise OSError(f"output: {reason}; what was made is kept as {finished}") from problem


def _share(path: Path) -> None:
    """Gives a file the permissions of a new one; mkstemp lets only the owner read it."""
    umask = os.umask(0)
    os.umask(umask)
    with suppress(OSError):  # network mounts refuse it
        path.chmod(0o666 & ~umask)
