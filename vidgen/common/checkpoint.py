"""Checkpoint files: read safely, loaded with nothing missing or left over, written whole."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

# What a folder of weights may hold, the first found is read; an index names several files.
FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.bin",
)
SHOWN = 5  # keys named in an error


def read_state_dict(path: str | Path, within: str | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, of several with an index, or of a torch file.

    Nothing in a file is ever executed: torch files are read with ``weights_only=True``.

    Args:
        within: the entry of a training checkpoint that holds them, used where there is one.

    Raises:
        ValueError: no such file, or something else in it.
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
        # the rest of torch's message tells how to read a file that one trusts
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
    """The files that an index names, all of them beside it."""
    names = read_config(index.parent, index.name).get("weight_map")
    files = set(map(str, names.values())) if isinstance(names, dict) else set()
    if not files or any(Path(name).name != name for name in files):
        expected = f"expected a weight_map of files beside it in {index}"
        raise ValueError(f"{index.name}: {expected}, got {names!r:.80}")
    return sorted(files)


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file. Raises ValueError where there is none, or something else in it."""
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
        ValueError: no config.json or no weights in it.
    """
    folder = Path(folder)
    config = read_config(folder)
    path = next((folder / name for name in FILES if (folder / name).exists()), None)
    if path is None:
        raise ValueError(f"folder: expected {' or '.join(FILES)} in {folder}, found none")
    return config, read_state_dict(path, within)


def read_config(folder: str | Path, name: str = "config.json") -> dict[str, Any]:
    """A JSON file of a folder. Raises ValueError where there is none, or it has no object."""
    path = Path(folder) / name
    if not path.is_file():
        raise ValueError(f"folder: expected {name} in {folder}, found none")
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{name}: expected an object in {path}, got {type(config).__name__}")
    return config


def read_json(path: Path) -> Any:
    """What is in a file. Raises ValueError where it is not JSON."""
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
    """Loads ``state`` into ``model``; a model on the meta device takes the tensors as they are.

    Args:
        prefix: removed from the keys that have it.
        skip: beginnings of keys that belong to other models and are left out.

    Raises:
        ValueError: keys missing or left over, other shapes.
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
    """A safetensors file, complete or not there. Raises ValueError where ``path`` exists."""
    from safetensors.torch import save_file

    with written_whole(path) as unfinished:
        save_file({key: x.detach().contiguous().cpu() for key, x in state.items()}, unfinished)


def check_new(path: Path, kind: str = "file") -> None:
    """Before long work. Raises ValueError where no new file, or folder, can be made there."""
    if os.path.lexists(path):  # a link to nothing, too
        raise ValueError(f"output: expected a new {kind}, {path} exists")
    if not path.parent.is_dir():
        raise ValueError(f"output: expected an existing folder, got {path.parent}")
    try:
        tempfile.NamedTemporaryFile(**_beside(path)).close()
    except OSError as problem:
        expected = f"expected a name and a folder that can be written, got {path}"
        raise ValueError(f"output: {expected}: {problem.strerror}") from problem


def _beside(path: Path) -> dict[str, Any]:
    """Of a temporary file, for `tempfile`."""
    return {"dir": path.parent, "prefix": f".{path.stem}-", "suffix": path.suffix}


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """A temporary name beside ``path``, which becomes ``path`` when all is written.

    Raises:
        ValueError: ``path`` exists: no file is overwritten; or its folder does not.
        OSError: the file is written, but cannot get its name (`publish`).
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
        OSError: that is not possible; the finished one is kept, and the message says where.
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
    """The rights of a new file, where the disk keeps any: mkstemp's is its owner's alone."""
    umask = os.umask(0)
    os.umask(umask)
    with suppress(OSError):  # network mounts refuse it
        path.chmod(0o666 & ~umask)
