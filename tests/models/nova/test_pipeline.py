"""NOVA from prompts, images and clips to frames and files, with small random models."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from vidgen.cli import main
from vidgen.commands import generate as command
from vidgen.common.checkpoint import write_state_dict
from vidgen.common.media import fit, read_frames
from vidgen.nova.checks import random_weights
from vidgen.nova.pipeline import NovaPipeline
from vidgen.nova.sampling.sampler import SamplingConfig
from vidgen.nova.sampling.schedules import DDPM
from vidgen.nova.text import write_features
from vidgen.ops import FUSED

pytestmark = pytest.mark.portable_only  # the sampler and its kernels have tests of their own


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder in the layout of the released ones, and features beside it."""
    pipeline = random_weights.random_pipeline()
    config = {
        "image_size": [64, 96],
        "text_token_dim": 16,
        "text_token_len": 8,
        "video_base_size": [4, 2, 3],
        "image_base_size": [4, 6],
        "video_mixer_rank": 4,
        "arch": {
            "video_encoder": {"depth": 2, "embed_dim": 32, "num_heads": 2},
            "image_encoder": {"depth": 4, "embed_dim": 32, "num_heads": 2, "encoder_depth": 2},
            "image_decoder": {"depth": 2, "embed_dim": 32},
        },
    }
    folders = {
        "transformer": (pipeline.transformer, "config.json", config),
        "vae": (pipeline.vae, "config.json", random_weights.SMALL_VAE),
        "scheduler": (
            None,
            "scheduler_config.json",
            {"_class_name": "DDPMScheduler", "clip_sample": False},
        ),
    }
    for name, (model, file, options) in folders.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(json.dumps(options))
        if model is not None:
            path = tmp_path / name / "diffusion_pytorch_model.safetensors"
            write_state_dict(path, model.state_dict())
    write_features(tmp_path / "text.safetensors", random_weights.random_features())
    return tmp_path


@pytest.fixture
def run_command(monkeypatch, tmp_path: Path) -> Iterator[Any]:
    """The command, with NOVA alone."""
    monkeypatch.setattr(command, "MODELS", {"nova": command.MODELS["nova"]})
    sizes = ["--steps", "2", "--device", "cpu", "--dtype", "fp32"]

    def run(name: str, *arguments: str) -> tuple[int, Path]:
        path = tmp_path / name
        sets = [] if "--sets" in arguments else ["--sets", "3"]
        status = main(["generate", "nova", "--output", str(path), *sizes, *sets, *arguments])
        return status, path

    yield run


def test_command_writes_images_and_videos(run_command, checkpoint, capsys):
    status, image = run_command("image.png", "--random-weights", "--latents", "1")
    assert status == 0 and read_frames(image).shape == (1, 64, 96, 3)
    status, clip = run_command("clip.mp4", "--random-weights", "--frames", "5")
    assert status == 0 and read_frames(clip).shape == (5, 64, 96, 3)
    assert not capsys.readouterr().err  # bars are for terminals

    given = "--checkpoint", str(checkpoint), "--embeddings", str(checkpoint / "text.safetensors")
    status, video = run_command("a.mp4", *given, "--latents", "2", "--image", str(image))
    assert status == 0 and len(read_frames(video)) == 5
    options = "--latents", "3", "--video", str(clip), "--width", "64"
    status, video = run_command("b.mp4", *given, *options)
    assert status == 0 and read_frames(video).shape == (9, 64, 64, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frames", "4"], "frames: expected 1 + 4 k, got 4"),
        (["--width", "50"], "width: expected a multiple of 32, got 50"),
        (["--class-label", "3"], "class-label: expected none for a model of texts"),
        (["--sets", "25"], "sets: expected at most 24, the tokens of a frame, got 25"),
    ],
)
def test_command_says_what_is_wrong(run_command, capsys, arguments, message):
    status, path = run_command("clip.mp4", "--random-weights", *arguments)
    assert status == 1 and not path.exists()
    assert message in capsys.readouterr().err


def test_checkpoints_make_what_their_models_do(checkpoint):
    read = NovaPipeline.from_pretrained(checkpoint, dtype=torch.float32, with_text_encoder=False)
    made = random_weights.random_pipeline(ops=FUSED)
    made.schedule = DDPM(clip_sample=False)
    assert read.schedule == made.schedule and read.default_steps == 100
    run = SamplingConfig(3, 2, 2, schedule=made.schedule)
    frames = []
    for pipeline in (read, made):
        generator = torch.Generator().manual_seed(1)
        parts = pipeline.generate(random_weights.random_features(), run, generator=generator)
        frames.append(torch.cat([*parts], dim=1))
    assert frames[0].shape == (1, 5, 64, 96, 3)
    # weights that lie elsewhere in memory may round otherwise
    assert (frames[0].int() - frames[1].int()).abs().max() <= 1
    with pytest.raises(ValueError, match="prompt: expected features"):
        read.encode_prompts(["a cat"])
    with pytest.raises(ValueError, match="video: expected 64 x 96 pixels, got 64 x 64"):
        read.encode_video(torch.zeros(1, 3, 1, 64, 64))


@pytest.mark.parametrize("upcast", [True, False])
def test_a_vae_that_overflows_in_fp16_stays_wide(checkpoint, upcast):
    options = {
        "block_out_channels": [4, 4, 4, 4],
        "norm_num_groups": 2,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "force_upcast": upcast,
    }
    vae: Any = AutoencoderKL.from_config(options)
    folder = checkpoint / "vae"
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    write_state_dict(folder / "diffusion_pytorch_model.safetensors", vae.state_dict())
    kind = {"_class_name": "AutoencoderKL"}
    (folder / "config.json").write_text(json.dumps({**options, **kind}))

    half = torch.float16
    pipeline = NovaPipeline.from_pretrained(checkpoint, dtype=half, with_text_encoder=False)
    assert pipeline.vae.dtype == (torch.float32 if upcast else half)
    given = pipeline.encode_video(torch.rand(1, 3, 1, 64, 96))
    assert given.dtype == pipeline.transformer.mask_embed.bos_token.dtype == half
    run = SamplingConfig(2, 1, 2, schedule=DDPM(beta_schedule="squaredcos_cap_v2"))
    parts = pipeline.generate(random_weights.random_features(), run, given=given)
    assert torch.cat([*parts], dim=1).shape == (1, 2, 64, 96, 3)
    wide = NovaPipeline.from_pretrained(checkpoint, dtype=torch.bfloat16, with_text_encoder=False)
    assert wide.vae.dtype == torch.bfloat16


def test_frames_are_fitted():
    frames = torch.randint(0, 256, (2, 30, 60, 3), dtype=torch.uint8)
    assert fit(frames, 64, 96).shape == (3, 2, 64, 96)
    torch.testing.assert_close(fit(frames, 30, 40), fit(frames[:, :, 10:50], 30, 40))
