"""NaN and infinity are named where they come in and where they arise."""

from pathlib import Path

import pytest
import torch

from vidgen.common.checkpoint import write_state_dict
from vidgen.common.finite import FiniteSteps, is_finite, require_finite
from vidgen.common.media import to_uint8
from vidgen.common.samples import Samples

pytestmark = pytest.mark.portable_only

BAD = (torch.nan, torch.inf, -torch.inf)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", BAD)
def test_one_bad_number_is_enough(bad: float, dtype: torch.dtype) -> None:
    x = torch.full((3, 5), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(x)  # whose sum would not be
    x[1, 2] = bad
    assert not is_finite(x)
    with pytest.raises(ValueError, match=r"a: expected finite numbers, got .* in 1 of 15"):
        require_finite({"ids": torch.ones(2, dtype=torch.int64), "a": x})


def test_nothing_is_finite() -> None:
    assert is_finite(torch.empty(0, 3))


def test_the_first_bad_step_is_named() -> None:
    steps = FiniteSteps("latents")
    steps.check()
    for i in range(4):
        steps.note(f"step {i}", torch.tensor([1.0, torch.nan if i > 1 else 2.0]))
    with pytest.raises(ValueError, match=r"latents: expected finite .* from step 2 on"):
        steps.check()
    steps.note("step 4", torch.ones(2))
    steps.check()  # what was told is not told again


@pytest.mark.parametrize("name", ["latents", "prompt"])
def test_samples_name_the_file_and_the_tensor(tmp_path: Path, name: str) -> None:
    for i in range(3):
        tensors = {"latents": torch.ones(2, 3), "prompt": torch.ones(4)}
        if i == 1:
            tensors[name][..., 0] = torch.nan
        write_state_dict(tmp_path / f"{i}.safetensors", tensors)
    samples = Samples(tmp_path, lambda sample: sample)
    found = []
    for position in range(3):
        try:
            samples.at(position)
        except ValueError as problem:
            found.append(str(problem))
    expected = f"{tmp_path / '1.safetensors'}: {name}: expected finite numbers, got NaN or infinity"
    assert len(found) == 1 and found[0].startswith(expected)


def test_frames_that_are_not_finite_are_named() -> None:
    video = torch.zeros(1, 3, 5, 8, 8)
    assert to_uint8(video).shape == (1, 5, 8, 8, 3)
    video[0, 1, 3, 2, 2] = torch.nan
    with pytest.raises(ValueError, match=r"frames: expected finite .* from frame 4 on"):
        to_uint8(video)
    with pytest.raises(ValueError, match=r"from frame 12 on"):
        to_uint8(video, first=8)


# what a tiny run of each command takes beside its features, and the step that is named
COMMANDS = {
    "repvideo": (["--steps", "3"], "from denoising step 1 of 3 on"),
    "pyramid-flow": (["--steps", "1", "--video-steps", "1"], "from step 1 of stage 1 of unit 1 on"),
    "nova": (["--steps", "2", "--sets", "2"], "from frame 1 of"),
}


@pytest.mark.parametrize("model", COMMANDS)
def test_commands_write_nothing_that_is_not_finite(
    model: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    """A network whose weights hold a NaN; status 1, and no file."""
    pytest.importorskip("diffusers")
    from vidgen import cli

    options, step = COMMANDS[model]
    original = torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda m, x: original(m, x) * torch.nan)
    path = tmp_path / "a.mp4"
    command = ["generate", model, "--random-weights", *options, "--output", str(path)]
    assert cli.main(command) == 1
    assert (
        f"latents: expected finite numbers, got NaN or infinity {step}" in capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model", COMMANDS)
def test_features_that_are_not_finite_are_refused_by_name(
    model: str, tmp_path: Path, capsys
) -> None:
    pytest.importorskip("diffusers")
    from vidgen import cli

    features = tmp_path / "a.safetensors"
    write_state_dict(features, {"prompt_embeds": torch.tensor([[[1.0, torch.nan]]])})
    command = ["generate", model, "--random-weights", "--embeddings", str(features)]
    assert cli.main([*command, "--output", str(tmp_path / "a.mp4")]) == 1
    expected = (
        "a.safetensors: prompt_embeds: expected finite numbers, got NaN or infinity in 1 of 2"
    )
    assert expected in capsys.readouterr().err
