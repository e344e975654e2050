"""Checkpoint files: reads them safely, loads all weights or none, writes whole files or none."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
)
SHOWN = 5  # the most keys that an error names


def read_state_dict(path: str | Path, within: str | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, of several files with an index, or of a torch file.

    No code in a file is executed: torch files are read with ``weights_only=True``.

    Args:
        within: the entry of a training checkpoint that holds the tensors, if it is there.

    Raises:
        ValueError: a missing file, or one without tensors.
    """
    path = Path(path)
    if path.name.endswith(".index.json"):
        return {
            k: x for name in _files_of(path) for k, x in read_state_dict(path.parent / name).items()
        }
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, UnpicklingError) as problem:
        # the rest of torch's message explains how to read trusted files
        what, _, _ = str(problem).partition(". ")
        raise ValueError(f"checkpoint: expected tensors in {path}: {what}") from problem
    if isinstance(state, dict) and within is not None and within in state:
        state = state[within]
    if not isinstance(state, dict):
        raise ValueError(
            f"checkpoint: expected tensors by name in {path}, got {type(state).__name__}"
        )
    return state


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
    path = next((folder / name for name in FILES if (folder / name).exists()), None)
    if path is None:
        raise ValueError(f"folder: expected {' or '.join(FILES)} in {folder}, found none")
    return config, read_state_dict(path, within)


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
        prefix: removed from the keys that begin with it.
        skip: keys that begin with one of these are ignored.

    Raises:
        ValueError: missing or unknown keys, or other shapes.
    """
    found = {
        key.removeprefix(prefix): x for key, x in state.items() if not key.startswith(tuple(skip))
    }
    expected = model.state_dict()
    for problem, keys in (
        ("missing", expected.keys() - found.keys()),
        ("left over", found.keys() - expected.keys()),
    ):
        if keys:
            names = ", ".join(sorted(keys)[:SHOWN])
            more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
            raise ValueError(
                f"checkpoint: expected the {len(expected)} keys of {type(model).__name__}, "
                f"got {len(keys)} {problem}: {names}{more}"
            )
    for key, x in expected.items():
        if found[key].shape != x.shape:
            raise ValueError(
                f"checkpoint: expected {key} of shape {list(x.shape)}, "
                f"got {list(found[key].shape)}; is config.json of another size?"
            )
    model.load_state_dict(found, assign=any(x.is_meta for x in expected.values()))


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
    """
    path = Path(path)
    check_new(path)
    handle, name = tempfile.mkstemp(**_beside(path))
    os.close(handle)
    unfinished = Path(name)
    try:
        yield unfinished
        umask = os.umask(0)
        os.umask(umask)
        unfinished.chmod(0o666 & ~umask)  # mkstemp lets only the owner read it
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)
