"""RepVideo's VAE, text features, pipeline and `vidgen generate repvideo`."""

import argparse
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vidgen import cli
from vidgen.common.media import read_frames
from vidgen.common.options import GenerateRun
from vidgen.common.progress import SILENT
from vidgen.ops import FUSED
from vidgen.repvideo import generate as command
from vidgen.repvideo.checks.random_weights import SMALL, SMALL_VAE
from vidgen.repvideo.convert import write_sat
from vidgen.repvideo.model.config import CogVideoXConfig
from vidgen.repvideo.model.transformer import CogVideoXTransformer
from vidgen.repvideo.model.weights import load_pretrained
from vidgen.repvideo.pipeline import RepVideoPipeline, Sampling, VideoSize
from vidgen.repvideo.sampling.schedules import sat_schedule
from vidgen.repvideo.text import (
    Prompts,
    TextEncoder,
    load_text_encoder,
    read_features,
    write_features,
)
from vidgen.repvideo.vae.vae import decode, encode, from_sat, load_pretrained_vae

pytestmark = pytest.mark.portable_only


def tiny_vae() -> Any:
    from diffusers import AutoencoderKLCogVideoX

    vae: Any = AutoencoderKLCogVideoX(**SMALL_VAE, sample_height=48, sample_width=64)
    return vae.eval().requires_grad_(False)


def sat_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the released 3d-vae.pt names them; what the loss has is in it, too."""
    found = {"loss.discriminator.0.weight": torch.zeros(1)}
    for key, x in state.items():
        parts = key.split(".")
        if parts[1] in ("down_blocks", "up_blocks"):
            side, level = parts[1].removesuffix("_blocks"), int(parts[2])
            parts[1:3] = [side, str(3 - level if side == "up" else level)]
            if parts[3] == "resnets":
                parts[3] = "block"
            else:  # downsamplers.0, upsamplers.0
                parts[3:5] = [f"{side}sample"]
        elif parts[1] == "mid_block":
            parts[1:4] = ["mid", f"block_{int(parts[3]) + 1}"]
        found[".".join("nin_shortcut" if p == "conv_shortcut" else p for p in parts)] = x
    return found


def test_a_vae_of_sat(tmp_path: Path) -> None:
    vae = tiny_vae()
    state, named = vae.state_dict(), sat_names(vae.state_dict())
    for given in (named, {f"first_stage_model.{key}": x for key, x in named.items()}):
        assert from_sat(given).keys() == state.keys()
    assert {"decoder.up.3.upsample.conv.weight", "encoder.mid.block_2.norm1.weight"} <= {*named}
    torch.save({"state_dict": named}, tmp_path / "3d-vae.pt")
    loaded = load_pretrained_vae(tmp_path / "3d-vae.pt", **SMALL_VAE)
    for key, x in loaded.state_dict().items():
        assert torch.equal(x, state[key])
    assert loaded.config.scaling_factor == 1.15258426
    with pytest.raises(ValueError, match=r"vae: expected a folder or a file, .* does not exist"):
        load_pretrained_vae(tmp_path / "none.pt")
    with pytest.raises(ValueError, match=r"checkpoint: expected the .* keys"):
        torch.save(dict(list(named.items())[:-1]), tmp_path / "part.pt")
        load_pretrained_vae(tmp_path / "part.pt", **SMALL_VAE)


def test_latents_have_unit_scale_and_frames_first(tmp_path: Path) -> None:
    vae = tiny_vae()
    vae.save_pretrained(tmp_path)
    loaded = load_pretrained_vae(tmp_path)
    pixels = torch.rand(1, 3, 5, 16, 32) * 2 - 1
    latents = encode(loaded, pixels)
    assert latents.shape == (1, 2, 16, 2, 4)
    mode = vae.encode(pixels).latent_dist.mode()
    torch.testing.assert_close(latents, 1.15258426 * mode.transpose(1, 2))
    torch.testing.assert_close(decode(loaded, latents), vae.decode(mode).sample)


CONFIG_1_5 = CogVideoXConfig(**{**asdict(SMALL), "patch_size_t": 2})


@pytest.mark.parametrize(
    ("config", "size", "shape"),
    [
        (CogVideoXConfig(), VideoSize(), (13, 16, 60, 90)),
        (CogVideoXConfig(), VideoSize(256, 384, 1), (1, 16, 32, 48)),
        (CONFIG_1_5, VideoSize(768, 1360, 81), (22, 16, 96, 170)),
    ],
)
def test_shapes_of_latents(config: CogVideoXConfig, size: VideoSize, shape: tuple) -> None:
    assert size.latent_shape(config) == shape


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (VideoSize(height=488), "height: expected a multiple of 16, got 488"),
        (VideoSize(width=0), "width: expected a multiple of 16, got 0"),
        (VideoSize(n_frames=48), r"frames: expected 1 \+ a multiple of 4, got 48"),
        (VideoSize(n_frames=-3), r"frames: expected 1 \+ a multiple of 4, got -3"),
    ],
)
def test_bad_sizes(size: VideoSize, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        size.latent_shape(CogVideoXConfig())


def test_models_that_do_not_fit() -> None:
    image_to_video = CogVideoXConfig(in_channels=32)
    with pytest.raises(ValueError, match="transformer: expected 16 channels and no ofs_embed_dim"):
        VideoSize().latent_shape(image_to_video)
    other = CogVideoXConfig(**{**asdict(SMALL), "in_channels": 4, "out_channels": 4})
    with pytest.raises(ValueError, match="vae: expected 4 channels, got 16"):
        RepVideoPipeline(CogVideoXTransformer(other), tiny_vae())


def test_frames_that_complete_a_patch_are_not_decoded() -> None:
    model = CogVideoXTransformer(CONFIG_1_5, FUSED)
    prompts = Prompts(torch.randn(1, 8, 16), None)
    size = VideoSize(16, 32, 9)
    assert size.latent_shape(CONFIG_1_5) == (4, 16, 2, 4)
    make = RepVideoPipeline(model, tiny_vae())
    pixels = make(prompts, size, Sampling(sat_schedule(2)), torch.Generator().manual_seed(0))
    assert pixels.shape == (1, 3, 9, 16, 32)


# ---- text


@pytest.fixture(scope="module")
def text_encoder() -> TextEncoder:
    from tests.models.text_encoders import t5, t5_tokenizer

    return TextEncoder(t5_tokenizer(), t5(), length=6)


def test_padding_is_text_and_long_prompts_are_cut(text_encoder: TextEncoder) -> None:
    made = text_encoder.encode(["a b", "a b c d e f g h"])
    assert made.shape == (2, 6, 10)
    words = ["▁a", "▁b", "</s>", "<pad>", "<pad>", "<pad>"]
    tokens = torch.tensor([text_encoder.tokenizer.convert_tokens_to_ids(words)])
    torch.testing.assert_close(made[:1], text_encoder.model(tokens).last_hidden_state)


def test_text_encoders_in_folders(text_encoder: TextEncoder, tmp_path: Path) -> None:
    model, tokenizer = tmp_path / "text_encoder", tmp_path / "tokenizer"
    with pytest.raises(ValueError, match=r"folder: expected config.json in .*text_encoder"):
        load_text_encoder(model, tokenizer, dtype=torch.float32, length=6)
    text_encoder.model.save_pretrained(model)
    text_encoder.tokenizer.save_pretrained(tokenizer)
    loaded = load_text_encoder(model, tokenizer, dtype=torch.float32, length=6)
    assert torch.equal(loaded.encode(["c a"]), text_encoder.encode(["c a"]))
    (model / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"text encoder: expected weights in .*file"):
        load_text_encoder(model, tokenizer, dtype=torch.float32, length=6)


def test_files_of_features(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    text = torch.randn(1, 4, 5)
    for uncond in (None, text + 1):
        path = tmp_path / f"{uncond is None}.safetensors"
        write_features(path, Prompts(text, uncond))
        found = read_features(load_file(path), 5)
        assert torch.equal(found.text, text) and (found.uncond is None) == (uncond is None)
    assert read_features({"prompt_embeds": text[0]}, 5).text.shape == (1, 4, 5)
    for tensors, message in (
        ({}, "embeddings: expected prompt_embeds and perhaps .*got nothing"),
        ({"prompt_embeds": text, "pooled": text}, "got pooled, prompt_embeds"),
        ({"prompt_embeds": text[..., :3]}, r"prompt_embeds: expected shape \[B, S, 5\]"),
        (
            {"prompt_embeds": text, "negative_prompt_embeds": text[:, :2]},
            r"negative_prompt_embeds: expected shape \[1, 4, 5\] as prompt_embeds has",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            read_features(tensors, 5)


# ---- the command


def generate(*arguments: object) -> int:
    return cli.main(["generate", "repvideo", *map(str, arguments)])


@pytest.mark.parametrize("ops", ["eager", "fused"])
def test_a_video_of_random_weights(ops: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / "video.mp4"
    texts = "--prompt", "a", "--negative-prompt", "b"  # nothing encodes them
    options = "--random-weights", *texts, "--steps", 2, "--ops", ops, "--tiling", "--output", path
    assert generate(*options) == 0
    frames = read_frames(path)
    assert frames.shape == (9, 48, 64, 3) and frames.float().std() > 0
    assert capsys.readouterr().out == f"{path}: 9 frames of 48 x 64\n"
    assert generate(*options) == 1  # is not overwritten
    assert "expected a new file" in capsys.readouterr().err


def test_a_pipeline_of_diffusers_gives_its_video(tmp_path: Path) -> None:
    """From a folder that diffusers writes, the frames that diffusers makes of it."""
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDPMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )

    from tests.models.text_encoders import t5, t5_tokenizer

    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        time_embed_dim=16,
        text_embed_dim=10,
        num_layers=2,
        sample_width=4,
        sample_height=4,
        sample_frames=5,
    )
    parts: dict[str, Any] = {
        "tokenizer": t5_tokenizer(),
        "text_encoder": t5(),
        "vae": AutoencoderKLCogVideoX(**SMALL_VAE),
        "transformer": transformer,
        "scheduler": CogVideoXDPMScheduler(
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
        ),
    }
    pipeline: Any = CogVideoXPipeline(**parts)
    pipeline.save_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        "a b",
        negative_prompt="c",
        height=32,
        width=48,
        num_frames=1,
        num_inference_steps=3,
        guidance_scale=4.0,
        use_dynamic_cfg=True,
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
    ).frames
    sizes = "--height", 32, "--width", 48, "--frames", 1, "--steps", 3, "--guidance-scale", 4
    texts = "--prompt", "a b", "--negative-prompt", "c", "--seed", 5
    path = tmp_path / "image.png"
    assert generate("--checkpoint", tmp_path / "pipeline", *sizes, *texts, "--output", path) == 0
    actual = read_frames(path)[0].float() / 255
    assert expected.std() > 0.01
    torch.testing.assert_close(actual, expected[0, 0].permute(1, 2, 0), atol=0.6 / 255, rtol=0)


@pytest.fixture
def sat_checkpoint(tmp_path: Path) -> Path:
    """A folder as RepVideo is released, with T5 beside it; its VAE is of another size."""
    from tests.models.text_encoders import t5, t5_tokenizer

    config = CogVideoXConfig(**{**asdict(SMALL), "num_layers": 3, "text_embed_dim": 10})
    write_sat(tmp_path / "RepVideo", CogVideoXTransformer(config))
    t5().save_pretrained(tmp_path / "t5-v1_1-xxl")
    t5_tokenizer().save_pretrained(tmp_path / "t5-v1_1-xxl")
    tiny_vae().save_pretrained(tmp_path / "vae")
    return tmp_path / "RepVideo"


def test_a_checkpoint_of_sat(sat_checkpoint: Path, tmp_path: Path) -> None:
    """Without a negative prompt guidance leads away from zeros, also where a file says so."""
    from safetensors.torch import save_file

    encoder = load_text_encoder(tmp_path / "t5-v1_1-xxl", dtype=torch.float32, length=226)
    text = encoder.encode(["a b"])
    zeros = {"prompt_embeds": text, "negative_prompt_embeds": torch.zeros_like(text)}
    save_file(zeros, tmp_path / "zeros.safetensors")
    save_file({"prompt_embeds": text}, tmp_path / "text.safetensors")
    empty = {"prompt_embeds": text, "negative_prompt_embeds": encoder.encode(["c"])}
    save_file(empty, tmp_path / "empty.safetensors")
    common = ("--checkpoint", sat_checkpoint, "--vae", tmp_path / "vae", "--height", 16)
    common += ("--width", 32, "--frames", 1, "--steps", 3)
    runs = (
        ("--prompt", "a b"),
        ("--embeddings", tmp_path / "zeros.safetensors"),
        ("--embeddings", tmp_path / "text.safetensors"),
        ("--embeddings", tmp_path / "empty.safetensors"),
        ("--prompt", "a b", "--negative-prompt", "c"),
        ("--prompt", "a b", "--no-dynamic-guidance", "--guidance-scale", 1),
    )
    made = []
    for i, options in enumerate(runs):
        path = tmp_path / f"{i}.png"
        assert generate(*common, *options, "--output", path) == 0
        made.append(read_frames(path))
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])
    assert torch.equal(made[3], made[4])
    assert len({bytes(x.numpy()) for x in made}) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--frames", 8), r"frames: expected 1 \+ a multiple of 4, got 8"),
        (("--width", 100), "width: expected a multiple of 16, got 100"),
        (("--schedule", "diffusers"), "schedule: expected sat without the scheduler"),
    ],
    ids=str,
)
def test_requests_that_cannot_be_met(options: tuple, message: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / "video.mp4"
    assert generate("--random-weights", *options, "--output", path) == 1
    assert re.search(f"^vidgen generate: {message}", capsys.readouterr().err, re.MULTILINE)
    assert not path.exists()


def test_checkpoints_that_are_not_whole(sat_checkpoint: Path, tmp_path: Path, capsys) -> None:
    path, prompt = tmp_path / "image.png", ("--prompt", "a", "--frames", 1)
    for checkpoint, message in (
        (tmp_path / "none", "checkpoint: expected a folder"),
        (tmp_path / "vae", "config: expected options of CogVideoXConfig"),
        (sat_checkpoint, "vae: expected a folder or a file, .*3d-vae.pt does not exist"),
    ):
        options = "--height", 16, "--width", 16, "--steps", 1, "--output", path
        assert generate("--checkpoint", checkpoint, *prompt, *options) == 1
        assert re.search(message, capsys.readouterr().err)


def test_latents_of_large_models_have_another_scale(tmp_path: Path, monkeypatch) -> None:
    """A file of SAT holds the weights alone, a folder its own scale."""
    seen = []

    def load(path: Path, **options: float) -> Any:
        seen.append(options)
        return tiny_vae()

    monkeypatch.setattr(command, "load_pretrained_vae", load)
    generator, cpu = torch.Generator(), torch.device("cpu")
    run = GenerateRun(tmp_path, "a", "", None, FUSED, torch.float32, cpu, generator, SILENT)
    for path in (tmp_path / "3d-vae.pt", tmp_path):
        for is_large in (False, True):
            config = CogVideoXConfig(use_rotary_positional_embeddings=is_large)
            command.find_vae(argparse.Namespace(vae=path), run, config)
    assert seen == [{}, {"scaling_factor": 0.7}, {}, {}]


@pytest.mark.parametrize("place", ["vae/vae", "vae"])
def test_the_vae_beside_a_sat_folder(tmp_path: Path, place: str, monkeypatch) -> None:
    """As the released archive unpacks, and flat."""
    (tmp_path / "RepVideo").mkdir()
    (tmp_path / "RepVideo" / "latest").write_text("1")
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / place / "3d-vae.pt").touch()
    found = []

    def note(path: Path, **options) -> None:
        found.append(path)
        raise ValueError("that is all")

    monkeypatch.setattr(command, "load_pretrained_vae", note)
    cpu, generator = torch.device("cpu"), torch.Generator()
    run = GenerateRun(
        tmp_path / "RepVideo", "a", "", None, FUSED, torch.float32, cpu, generator, SILENT
    )
    with pytest.raises(ValueError, match="that is all"):
        command.find_vae(argparse.Namespace(vae=None), run, CogVideoXConfig())
    assert found == [(tmp_path / place / "3d-vae.pt").resolve()]


def test_a_sat_folder_without_latest_says_what_to_write(tmp_path: Path) -> None:
    (tmp_path / "1000").mkdir()
    (tmp_path / "1000" / "mp_rank_00_model_states.pt").touch()
    with pytest.raises(ValueError, match=r"expected a file named latest in .* into it \(1000\)"):
        load_pretrained(tmp_path)
