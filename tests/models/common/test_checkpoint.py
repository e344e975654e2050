"""Checkpoints as other code leaves them: wrapped, in shards, in variants, with NumPy's state."""

import argparse
import json
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vidgen.common.checkpoint import load_exactly, read_folder, read_state_dict, write_state_dict

pytestmark = pytest.mark.portable_only


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.out = nn.Linear(2, 1)


def weights() -> dict[str, Tensor]:
    return {key: torch.rand_like(x) for key, x in Model().state_dict().items()}


def assert_loads(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    model = Model()
    load_exactly(model, state)
    assert all(torch.equal(x, expected[key]) for key, x in model.state_dict().items())


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    "prefix",
    [
        *("module.", "_orig_mod.", "base_model.model.", "transformer."),
        *(
            "module._orig_mod.",
            "_orig_mod.module.",
            "model.net.",
        ),  # the last: of nobody in particular
    ],
)
def test_prefixes_of_wrappers_are_taken_off(tmp_path: Path, prefix: str, suffix: str) -> None:
    state = weights()
    wrapped = {prefix + key: x for key, x in state.items()}
    path = tmp_path / f"a{suffix}"
    write_state_dict(path, wrapped) if suffix == ".safetensors" else torch.save(wrapped, path)
    assert_loads(read_state_dict(path), state)


def test_compiled_blocks(tmp_path: Path) -> None:
    state = weights()
    compiled = {key.replace("blocks.0.", "blocks.0._orig_mod."): x for key, x in state.items()}
    write_state_dict(tmp_path / "a.safetensors", compiled)
    assert_loads(read_state_dict(tmp_path / "a.safetensors"), state)


def test_both_sides_are_shown_where_nothing_fits() -> None:
    state = {f"net.{key}": x for key, x in weights().items()}
    state["other"] = torch.ones(1)
    expected = r"6 keys of Model, got 6 missing: blocks\..* and 1 more; 7 left over: net\.blocks"
    with pytest.raises(ValueError, match=expected):
        load_exactly(Model(), state)


def shards(folder: Path, suffix: str, index: str) -> dict[str, Tensor]:
    """Two files and their index."""
    state = weights()
    names = {key: f"diffusion_pytorch_model-0000{i % 2 + 1}-of-00002{suffix}"
             for i, key in enumerate(state)}  # fmt: skip
    for name in set(names.values()):
        part = {key: x for key, x in state.items() if names[key] == name}
        if suffix.endswith(".bin"):
            torch.save(part, folder / name)
        else:
            write_state_dict(folder / name, part)
    (folder / index).write_text(json.dumps({"weight_map": names}))
    return state


@pytest.mark.parametrize(
    ("suffix", "index"),
    [
        (".safetensors", "diffusion_pytorch_model.safetensors.index.json"),
        (".bin", "diffusion_pytorch_model.bin.index.json"),
        (".fp16.safetensors", "diffusion_pytorch_model.safetensors.index.fp16.json"),
        (".fp16.bin", "diffusion_pytorch_model.bin.index.fp16.json"),
    ],
)
def test_weights_in_shards(tmp_path: Path, suffix: str, index: str) -> None:
    (tmp_path / "config.json").write_text('{"a": 1}')
    state = shards(tmp_path, suffix, index)
    config, found = read_folder(tmp_path)
    assert config == {"a": 1}
    assert_loads(found, state)


@pytest.mark.parametrize("suffix", ["fp16.safetensors", "bf16.safetensors", "fp16.bin"])
def test_files_of_a_variant(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    state = weights()
    path = tmp_path / f"diffusion_pytorch_model.{suffix}"
    torch.save(state, path) if suffix.endswith("bin") else write_state_dict(path, state)
    assert_loads(read_folder(tmp_path)[1], state)


def test_of_several_variants_none_is_chosen(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for variant in ("fp16.", "non_ema."):
        write_state_dict(tmp_path / f"diffusion_pytorch_model.{variant}safetensors", weights())
    with pytest.raises(ValueError, match=r"weights of one variant in .*fp16\.safet.*non_ema\.saf"):
        read_folder(tmp_path)
    write_state_dict(tmp_path / "diffusion_pytorch_model.safetensors", state := weights())
    assert_loads(read_folder(tmp_path)[1], state)


def trainer_state() -> dict[str, Any]:
    """As SAT's trainer saves it."""
    return {
        "module": {"a": torch.ones(2)},
        "iteration": 3,
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "loss": np.float32(1.5),
        "mask": np.array([True, False]),
    }


def test_the_random_state_of_numpy_is_read(tmp_path: Path) -> None:
    torch.save(trainer_state(), tmp_path / "a.pt")
    assert read_state_dict(tmp_path / "a.pt", "module").keys() == {"a"}


@pytest.mark.parametrize("core", [b"numpy.core.", b"numpy._core."])
def test_both_names_of_numpys_core_are_read(tmp_path: Path, core: bytes) -> None:
    """NumPy 1 and 2 name the same functions differently."""
    torch.save(trainer_state(), tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as old,
        zipfile.ZipFile(tmp_path / "b.pt", "w") as new,
    ):
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("data.pkl"):
                data = data.replace(b"numpy._core.", core).replace(b"numpy.core.", core)
                assert core + b"multiarray" in data
            new.writestr(name, data)
    assert read_state_dict(tmp_path / "b.pt", "module").keys() == {"a"}


def test_what_is_not_loaded_is_named(tmp_path: Path) -> None:
    state = {"module": {"a": torch.ones(2)}, "args": argparse.Namespace(rank=0)}
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt: it holds argparse\.Namespace, which could run"):
        read_state_dict(tmp_path / "a.pt", "module")


class Payload:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_nothing_is_executed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Payload()}, "a.pt")
    with pytest.raises(ValueError, match="which could run code and is not loaded"):
        read_state_dict("a.pt")
    assert not Path("executed").exists()
