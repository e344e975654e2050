"""What is finished gets its name or is kept; what is not leaves nothing behind."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vidgen.common.checkpoint import publish, read_state_dict, write_state_dict, written_whole
from vidgen.common.media import write_frames
from vidgen.common.trainer import write_checkpoint

pytestmark = pytest.mark.portable_only


def refuse(*arguments, **options):
    raise PermissionError(1, "Operation not permitted")


class Objective(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = {"size": 2}
        self.model = nn.Linear(2, 2)


def frames() -> Tensor:
    return torch.zeros(2, 16, 16, 3, dtype=torch.uint8)


WRITERS = {
    "video.mp4": lambda path: write_frames(path, frames(), fps=8),
    "image.png": lambda path: write_frames(path, frames()[:1]),
    "weights.safetensors": lambda path: write_state_dict(path, {"a": torch.ones(2)}),
    "checkpoint": lambda path: write_checkpoint(path, Objective(), {"step": 1}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_refuses_chmod_gets_the_file(tmp_path: Path, monkeypatch, name: str) -> None:
    monkeypatch.setattr(os, "chmod", refuse)
    WRITERS[name](tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_without_links_gets_the_file(tmp_path: Path, monkeypatch, name: str) -> None:
    monkeypatch.setattr(os, "link", refuse)
    WRITERS[name](tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_files_are_readable_by_others(tmp_path: Path) -> None:
    umask = os.umask(0o022)
    try:
        WRITERS["weights.safetensors"](tmp_path / "a.safetensors")
    finally:
        os.umask(umask)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("name", WRITERS)
def test_what_is_finished_is_kept_where_it_cannot_get_its_name(
    tmp_path: Path, monkeypatch, name: str
) -> None:
    for step in ("link", "rename"):
        monkeypatch.setattr(os, step, refuse)
    path = tmp_path / name
    if name == "checkpoint":  # its files need names of their own
        monkeypatch.undo()
        monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(
        OSError, match=f"could not write .*{name}: .*; what was made is kept as "
    ) as e:
        WRITERS[name](path)
    kept = Path(str(e.value).rpartition(" kept as ")[2])
    assert kept.exists() and not path.exists()
    assert list(tmp_path.iterdir()) == [kept]


@pytest.mark.parametrize("links", [True, False])
def test_two_that_finish_at_once_overwrite_nothing(
    tmp_path: Path, monkeypatch, links: bool
) -> None:
    """The name was free when each began; the second keeps its file and says so."""
    if not links:
        monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "a.txt"
    with (
        pytest.raises(
            OSError, match=r"could not write .*a\.txt: File exists; what was made is kept"
        ),
        written_whole(path) as second,
    ):
        second.write_text("second")
        with written_whole(path) as first:
            first.write_text("first")
    assert path.read_text() == "first" and second.read_text() == "second"


def test_what_is_not_finished_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), written_whole(tmp_path / "a.txt") as path:
        path.write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_folder_is_published_whole(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "step_1", Objective(), {"step": 1})
    found = read_state_dict(tmp_path / "step_1" / "diffusion_pytorch_model.safetensors")
    assert sorted(found) == ["bias", "weight"]
    (tmp_path / "new").mkdir()
    with pytest.raises(OSError, match="what was made is kept"):
        publish(tmp_path / "new", tmp_path / "step_1")
