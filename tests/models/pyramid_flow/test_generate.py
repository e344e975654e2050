"""`vidgen generate pyramid-flow`: its input and output files, and its errors."""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.models.text_encoders import write_flux
from vidgen import cli
from vidgen.common.media import fit, read_frames, write_frames
from vidgen.pyramid_flow.checks.random_weights import (
    SMALL,
    SMALL_VAE,
    random_pipeline,
    random_prompts,
)
from vidgen.pyramid_flow.generate import add_arguments, guidance_of
from vidgen.pyramid_flow.model.config import FluxConfig
from vidgen.pyramid_flow.pipeline import VAE_FOLDER, PyramidFlowPipeline
from vidgen.pyramid_flow.text import NEGATIVE_PROMPT, write_features

pytestmark = pytest.mark.portable_only  # the sampler and its kernels have tests of their own

FAST = ["--steps", "1", "--video-steps", "1", "--width", "64"]


def generate(output: Path, *options: str | Path, random: bool = True) -> int:
    weights = ["--random-weights"] if random else []
    words = ["generate", "pyramid-flow", *weights, "--output", output, *FAST, *options]
    return cli.main([str(word) for word in words])


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """12 frames of 80 x 96, of which 9 are used."""
    path = tmp_path / "clip.mp4"
    write_frames(path, torch.arange(12 * 80 * 96 * 3).view(12, 80, 96, 3).to(torch.uint8), 24)
    return path


def test_text_to_image(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    assert generate(path) == 0
    assert read_frames(path).shape == (1, 64, 64, 3)


def test_text_to_video(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.mp4"
    assert generate(path, "--frames", "25", "--height", "128", "--cache", "all") == 0
    assert read_frames(path).shape == (25, 128, 64, 3)
    out, err = capfd.readouterr()
    assert "25 frames of 128 x 64" in out
    # with four units, nothing of the highest stage can be reused
    assert "cache of stages 0, 1:" in err and "MB of memory of the device" in err


@pytest.mark.parametrize("length", [["--units", "3"], ["--frames", "33"]], ids=lambda x: x[0])
def test_units_of_several_frames(length: list[str], clip: Path) -> None:
    """A unit has 16 frames, so that of 12 frames only the last one begins the video."""
    path = clip.with_name("a.mp4")
    assert generate(path, "--video", clip, "--frames-per-unit", "2", *length) == 0
    assert len(read_frames(path)) == 33


def test_guidance_as_asked_for() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser.add_argument_group())
    for options, scales in (
        ([], [7.0, 5.0, 5.0]),
        (["--image", "a.png", "--guidance-scale", "3"], [3.0, 4.0, 4.0]),
        (["--linear-guidance", "--guidance-scale", "2.8"], [2.8, 2.3, 2.0]),
    ):
        guidance = guidance_of(parser.parse_args(options))
        assert [guidance.scale(unit) for unit in range(3)] == pytest.approx(scales)


def test_the_seed_decides(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, seed, low in zip(paths, "112", ([], ["--low-memory"], []), strict=True):
        assert generate(path, "--seed", seed, *low) == 0
    a, b, c = (read_frames(path).int() for path in paths)
    assert (a - b).abs().max() <= 1 and (a - c).abs().max() > 1


def test_image_to_video(tmp_path: Path) -> None:
    image, path = tmp_path / "image.png", tmp_path / "a.mp4"
    write_frames(image, (torch.rand(1, 96, 64, 3) * 255).to(torch.uint8))
    assert generate(path, "--image", image, "--units", "2", "--tiling", "32") == 0
    assert read_frames(path).shape == (9, 64, 64, 3)


@pytest.mark.parametrize(("new_only", "n_frames"), [([], 17), (["--new-only"], 8)])
def test_the_continuation_of_a_clip(
    tmp_path: Path, clip: Path, new_only: list[str], n_frames: int
) -> None:
    path = tmp_path / "a.mp4"
    assert generate(path, "--video", clip, "--units", "3", *new_only) == 0
    assert read_frames(path).shape == (n_frames, 64, 64, 3)


def test_the_end_of_a_clip_is_continued(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded, encode = [], PyramidFlowPipeline.encode_video

    def spy(self: PyramidFlowPipeline, video: Tensor, **options: Any) -> Tensor:
        encoded.append(video)
        return encode(self, video, **options)

    monkeypatch.setattr(PyramidFlowPipeline, "encode_video", spy)
    assert generate(clip.with_name("a.mp4"), "--video", clip, "--units", "3") == 0
    assert torch.equal(encoded[0], fit(read_frames(clip)[3:], 64, 64)[None])


def write_checkpoint(folder: Path, joint: int, pooled: int) -> None:
    config = replace(SMALL, joint_attention_dim=joint, pooled_projection_dim=pooled)
    small = random_pipeline(config)
    for name, model, sizes in (
        ("diffusion_transformer_384p", small.transformer, config),
        (VAE_FOLDER, small.vae, SMALL_VAE),
    ):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(asdict(sizes)))
        weights = {key: x.contiguous() for key, x in model.state_dict().items()}
        save_file(weights, folder / name / "diffusion_pytorch_model.safetensors")


def test_a_checkpoint_with_a_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, texts = tmp_path / "checkpoint", []
    write_checkpoint(folder, joint=10, pooled=8)
    write_flux(folder)
    options = ["--checkpoint", folder, "--variant", "diffusion_transformer_384p", "--prompt", "a b"]
    encode = PyramidFlowPipeline.encode_prompts

    def spy(self: PyramidFlowPipeline, *arguments: object) -> object:
        texts.append(arguments)
        return encode(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(PyramidFlowPipeline, "encode_prompts", spy)
    path = tmp_path / "a.png"
    assert generate(path, *options, "--height", "64", random=False) == 0
    assert read_frames(path).shape == (1, 64, 64, 3)
    other = tmp_path / "b.png"
    assert generate(other, *options, "--negative-prompt", "c", random=False) == 0
    assert read_frames(other).shape == (1, 384, 64, 3)  # the variant's height
    assert texts == [(["a b"], NEGATIVE_PROMPT), (["a b"], "c")]


def test_a_checkpoint_with_features(tmp_path: Path) -> None:
    folder, features = tmp_path / "checkpoint", tmp_path / "features.safetensors"
    write_checkpoint(folder, SMALL.joint_attention_dim, SMALL.pooled_projection_dim)
    write_features(features, random_prompts())
    options = ["--checkpoint", folder, "--embeddings", features, "--height", "64"]
    options += ["--variant", "diffusion_transformer_384p"]
    path, expected = tmp_path / "a.png", tmp_path / "b.png"
    assert generate(path, *options, random=False) == 0
    assert generate(expected) == 0  # the same weights and features
    assert torch.equal(read_frames(path), read_frames(expected))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--height", "100"], "height: expected a multiple of 64, got 100"),
        (["--frames", "16"], "frames: expected 1 + 8 k, got 16"),
        (["--frames", "25", "--frames-per-unit", "2"], "frames: expected 1 + 16 k, got 25"),
        (["--cache", "much"], "cache: expected off, stages01, all or a number of bytes, got much"),
        (["--cache", "-5"], "cache: expected off, stages01, all or a number of bytes, got -5"),
        (["--cache", "nan"], "cache: expected off, stages01, all or a number of bytes, got nan"),
        (["--image", "nowhere.png"], "input: expected a video or image file, nowhere.png does not"),
        (["--video", "clip.mp4", "--units", "2"], "units: expected more than the 2 given, got 2"),
        (["--new-only"], "new-only: expected a clip in --video, got none"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_requests(
    tmp_path: Path,
    clip: Path,
    options: list[str],
    message: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.mp4"
    assert generate(path, *options) == 1
    assert f"vidgen generate: {message}" in capfd.readouterr().err
    assert not path.exists()


def test_missing_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, folder = tmp_path / "a.png", tmp_path / "checkpoint"
    options = ["--checkpoint", folder, "--prompt", "a", "--variant"]
    variant = "diffusion_transformer_384p"

    def message(variant: str, *more: str) -> str:
        assert generate(path, *options, variant, *more, random=False) == 1
        assert not path.exists()
        return capfd.readouterr().err

    assert "folder: expected config.json in" in message(variant)
    write_checkpoint(folder, joint=10, pooled=8)
    assert "folder: expected config.json in" in message(variant)  # no text encoders
    write_flux(folder)
    assert "height, width: expected both for the variant mine" in message("mine")
    assert f"expected config.json in {folder / 'mine'}" in message("mine", "--height", "64")
    (folder / variant / "diffusion_pytorch_model.safetensors").unlink()
    assert "folder: expected diffusion_pytorch_model.safetensors or" in message(variant)


@pytest.mark.parametrize(
    "flags", [{"use_flash_attn": True}, {"use_temporal_causal": False}, {}], ids=str
)
def test_causal_whatever_the_config_says(flags: dict, tmp_path: Path, monkeypatch) -> None:
    """The official pipeline forces it when it loads a model; both ways is an option."""
    asked = []

    def note(folder: Path, ops, **options) -> None:
        asked.append({**flags, **options})
        raise ValueError("that is all")

    monkeypatch.setattr("vidgen.pyramid_flow.pipeline.load_pretrained", note)
    for bidirectional in (False, True):
        with pytest.raises(ValueError, match="that is all"):
            PyramidFlowPipeline.from_pretrained(tmp_path, "a", bidirectional=bidirectional)
    models = [FluxConfig.from_dict(options) for options in asked]
    assert [model.use_temporal_causal for model in models] == [True, False]


@pytest.mark.parametrize("cache", ["all", "16e9"])
def test_both_ways_turns_the_cache_off(cache: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / "a.mp4"
    assert generate(path, "--bidirectional", "--cache", cache, "--units", "3") == 0
    assert path.exists() and "cache of stages" not in capsys.readouterr().err
