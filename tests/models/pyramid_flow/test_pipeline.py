"""Pyramid Flow from prompts and pixels to frames, with small random models."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.models.text_encoders import write_flux
from tests.paths import GOLDEN
from vidgen.commands import verify
from vidgen.common.media import to_uint8
from vidgen.ops import EAGER, FUSED
from vidgen.pyramid_flow import offload
from vidgen.pyramid_flow.checks.golden_sampling import RecordedNoise, below, sampling_config
from vidgen.pyramid_flow.checks.random_weights import (
    SMALL,
    SMALL_VAE,
    random_pipeline,
    random_prompts,
)
from vidgen.pyramid_flow.model.config import MMDiTConfig
from vidgen.pyramid_flow.model.kv_cache import CachePolicy
from vidgen.pyramid_flow.model.weights import load_transformer
from vidgen.pyramid_flow.offload import Placement
from vidgen.pyramid_flow.pipeline import VAE_FOLDER, PyramidFlowPipeline, UnitDecoder
from vidgen.pyramid_flow.sampling.config import SamplingConfig
from vidgen.pyramid_flow.sampling.guidance import Guidance
from vidgen.pyramid_flow.sampling.noise import DrawnNoise
from vidgen.pyramid_flow.sampling.sampler import sample
from vidgen.pyramid_flow.text import NEGATIVE_PROMPT, PARTS, PROMPT_SUFFIX, Prompts, TextFeatures
from vidgen.pyramid_flow.vae.latents import LATENT_STATS, denormalize_latents
from vidgen.pyramid_flow.vae.weights import load_vae

CASES = GOLDEN / "pyramid_flow"
pytestmark = pytest.mark.portable_only  # the sampler and its kernels have tests of their own

CONFIG = SamplingConfig(
    size=(8, 8), n_units=3, first_steps=(1, 1, 1), steps=(1, 1, 1), guidance=Guidance(2.0, 3.0)
)


@pytest.fixture(scope="module")
def pipeline() -> PyramidFlowPipeline:
    return random_pipeline()


def noise() -> DrawnNoise:
    return DrawnNoise(torch.Generator().manual_seed(3))


def clip(n_frames: int, batch: int = 1) -> Tensor:
    """Smooth moving colours ``[B, 3, F, 64, 64]``."""
    t = torch.arange(float(n_frames))[:, None, None]
    y, x = torch.arange(64.0)[:, None] / 20, torch.arange(64.0) / 20
    frames = torch.stack([torch.sin(x + 0.1 * t + 0 * y), torch.cos(y - 0.2 * t + 0 * x)])
    frames = torch.cat([frames, frames[:1] * frames[1:]])
    return frames.expand(batch, -1, -1, -1, -1)


def assert_same_frames(actual: Tensor, expected: Tensor) -> None:
    """Equal uint8 frames, except for a few pixels that rounding changes by one level."""
    assert actual.dtype == torch.uint8 and actual.shape == expected.shape
    difference = (actual.int() - expected.int()).abs()
    assert difference.max() <= 1 and (difference != 0).float().mean() < 1e-3


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 2, 2), (3, 1)], ids=str)
def test_units_are_decoded_as_they_come(
    pipeline: PyramidFlowPipeline, sizes: tuple[int, ...]
) -> None:
    vae = pipeline.vae
    latents = torch.randn(2, 4, sum(sizes), 8, 8)
    decode = UnitDecoder(vae, pipeline.stats)
    frames = [decode(unit) for unit in latents.split(sizes, dim=2)]
    assert [x.shape[1] for x in frames] == [8 * n - 7 * (i == 0) for i, n in enumerate(sizes)]
    with torch.no_grad():
        at_once = vae.decode(denormalize_latents(latents, pipeline.stats))
    assert_same_frames(torch.cat(frames, dim=1), to_uint8(at_once, rounded=False))
    assert frames[0].float().std() > 1


def test_text_to_video_is_the_sampler_and_then_the_vae(pipeline: PyramidFlowPipeline) -> None:
    prompts, seen = random_prompts(n=2), []
    frames = pipeline.generate(prompts, CONFIG, noise=noise(), on_frames=seen.append)
    latents = sample(pipeline.transformer, prompts, CONFIG, noise=noise())
    assert frames.shape == (2, 17, 64, 64, 3)
    assert_same_frames(frames, pipeline.decode(latents))
    assert [x.shape[1] for x in seen] == [1, 8, 8]
    assert torch.equal(torch.cat(seen, dim=1), frames)


def test_text_to_image(pipeline: PyramidFlowPipeline) -> None:
    frames = pipeline.generate(random_prompts(), replace(CONFIG, n_units=1), noise=noise())
    assert frames.shape == (1, 1, 64, 64, 3)


@pytest.mark.parametrize("n_frames", [1, 9])
def test_going_on_from_an_image_or_a_clip(pipeline: PyramidFlowPipeline, n_frames: int) -> None:
    generator = torch.Generator().manual_seed(0)
    given = pipeline.encode_video(clip(n_frames), generator=generator)
    prompts, seen = random_prompts(n=2), []
    frames = pipeline.generate(
        prompts, CONFIG, given=given, noise=noise(), on_frames=seen.append
    )  # one beginning for two prompts
    assert frames.shape == (2, 17, 64, 64, 3)
    assert_same_frames(frames[:, :n_frames], pipeline.decode(given).expand(2, -1, -1, -1, -1))
    assert (frames[0, n_frames:] != frames[1, n_frames:]).any()
    assert sum(x.shape[1] for x in seen) == 17
    latents = sample(
        pipeline.transformer, prompts, CONFIG, given=given.expand(2, -1, -1, -1, -1), noise=noise()
    )
    assert_same_frames(frames, pipeline.decode(latents))


def test_the_cache_changes_nothing(pipeline: PyramidFlowPipeline) -> None:
    prompts, config = random_prompts(), replace(CONFIG, n_units=4)
    expected = pipeline.generate(prompts, config, noise=noise())
    cached = replace(config, cache=CachePolicy())
    assert_same_frames(pipeline.generate(prompts, cached, noise=noise()), expected)


def test_frames_of_the_released_code() -> None:
    """Decoding unit by unit gives the recorded frames of a video that continues an image."""
    (case,) = (c for c in verify.find_cases(CASES) if c.kind == "i2v")
    inputs, expected = case.tensors("in.", "cpu"), case.tensors("out.", "cpu")
    w, sampling = case.tensors("w.", "cpu"), case.config["sampling"]
    pipeline = PyramidFlowPipeline(
        load_transformer(case.config["transformer"], below("dit.", w), FUSED),
        load_vae(case.config["vae"], below("vae.", w)),
    )
    assert sampling["model_name"] == "pyramid_flux"
    given = expected["image_latent"]
    config = sampling_config(sampling, (given.shape[3], given.shape[4]))
    prompts = Prompts(
        *(TextFeatures(*(inputs[f"{name}.{part}"] for part in PARTS)) for name in Prompts._fields)
    )
    frames = pipeline.generate(prompts, config, given=given, noise=RecordedNoise(inputs))
    difference = frames[0, ::4].int() - expected["frames_every4"].int()
    assert difference.abs().max() <= 1


@pytest.mark.parametrize("n_frames", [1, 17, 25])
def test_latents_of_a_clip(pipeline: PyramidFlowPipeline, n_frames: int) -> None:
    """Clips are encoded in chunks, sampled from the posterior, and normalised."""
    video = clip(n_frames, batch=2)
    latents = pipeline.encode_video(video, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        posterior = pipeline.vae.encode(video)
    raw = posterior.sample(torch.Generator().manual_seed(1))
    (shift, scale), (video_shift, video_scale) = LATENT_STATS["pyramid_flux"]
    torch.testing.assert_close(latents[:, :, :1], (raw[:, :, :1] - shift) * scale)
    torch.testing.assert_close(latents[:, :, 1:], (raw[:, :, 1:] - video_shift) * video_scale)


def test_latents_of_images_depend_on_the_model() -> None:
    small = MMDiTConfig(
        in_channels=4, num_layers=1, num_attention_heads=1, joint_attention_dim=8, sample_size=8
    )
    assert random_pipeline(small).stats == LATENT_STATS["pyramid_mmdit"]
    assert random_pipeline().stats == LATENT_STATS["pyramid_flux"]


def test_bad_sizes(pipeline: PyramidFlowPipeline) -> None:
    with pytest.raises(ValueError, match="height: expected a multiple of 64, got 100"):
        pipeline.latent_size(100, 64)
    with pytest.raises(ValueError, match="width: expected a multiple of 64, got 0"):
        pipeline.latent_size(64, 0)
    with pytest.raises(ValueError, match="width: expected a multiple of 64, got 32"):
        pipeline.encode_video(clip(1)[..., :32])
    with pytest.raises(ValueError, match=r"video: expected 8 k \+ 1 frames, got 8"):
        pipeline.encode_video(clip(8))
    with pytest.raises(ValueError, match="n_units: expected more than the 3 given, got 3"):
        pipeline.generate(random_prompts(), CONFIG, given=torch.zeros(1, 4, 3, 8, 8))
    with pytest.raises(ValueError, match=r"given: expected \[1, 4, frames, 8, 8\], got \[2, 4, 1"):
        pipeline.generate(random_prompts(), CONFIG, given=torch.zeros(2, 4, 1, 8, 8))
    with pytest.raises(ValueError, match="tile: expected a multiple of 32 pixels, got 100"):
        pipeline.generate(random_prompts(), CONFIG, tile=100)
    assert pipeline.latent_size(384, 640) == (48, 80)


class Words(nn.Module):
    """A text encoder that records its texts."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.texts: list[str] = []

    def forward(self, texts: Sequence[str]) -> TextFeatures:
        self.texts += texts
        x = torch.arange(float(len(texts)))[:, None]
        return TextFeatures(x[:, None].expand(-1, 5, 8), x.expand(-1, 5), x.expand(-1, 3))


def test_prompts_are_encoded_as_the_released_code_does() -> None:
    words, plain = Words(), random_pipeline()
    pipeline = PyramidFlowPipeline(plain.transformer, plain.vae, words)  # type: ignore[arg-type]
    prompt, negative = pipeline.encode_prompts(["a cat", "a dog"])
    assert words.texts == ["a cat" + PROMPT_SUFFIX, "a dog" + PROMPT_SUFFIX, NEGATIVE_PROMPT]
    assert prompt.pooled.tolist() == [[0] * 3, [1] * 3]
    assert negative is not None and negative.pooled.tolist() == [[2] * 3]
    with pytest.raises(ValueError, match="prompt: expected features, for no text encoders"):
        plain.encode_prompts(["a cat"])


def test_low_memory_holds_one_model_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here weights on the device are copies, so that the test can tell which model is there."""
    pipeline = random_pipeline(placement=Placement(low_memory=True))
    models = {"transformer": pipeline.transformer, "vae": pipeline.vae}
    home = {name: [x.data_ptr() for x in model.parameters()] for name, model in models.items()}
    n_moved, there = [], []
    monkeypatch.setattr(
        offload, "_to_device", lambda x, device: n_moved.append(x.numel()) or x.clone()
    )

    def who_is_there(name: str) -> None:
        for other, model in models.items():
            away = [x.data_ptr() != y for x, y in zip(model.parameters(), home[other], strict=True)]
            assert set(away) == {other == name}
        there.append(name)

    pipeline.transformer.register_forward_pre_hook(lambda *_: who_is_there("transformer"))
    for module in (pipeline.vae.encoder, pipeline.vae.decoder):
        module.register_forward_pre_hook(lambda *_: who_is_there("vae"))
    generator = torch.Generator().manual_seed(0)
    given = pipeline.encode_video(clip(1), generator=generator)
    frames = pipeline.generate(random_prompts(), CONFIG, given=given, noise=noise())
    order = [name for i, name in enumerate(there) if i == 0 or there[i - 1] != name]
    assert order == ["vae", "transformer", "vae"]
    sizes = [sum(x.numel() for x in [*m.parameters(), *m.buffers()]) for m in models.values()]
    assert sum(n_moved) == sizes[0] + 2 * sizes[1]
    for name, model in models.items():
        assert [x.data_ptr() for x in model.parameters()] == home[name]
    plain = random_pipeline()
    assert_same_frames(frames, plain.generate(random_prompts(), CONFIG, given=given, noise=noise()))


def test_what_visits_goes_home_after_an_error() -> None:
    model = nn.Linear(2, 2)
    before = model.weight.data_ptr()
    with pytest.raises(RuntimeError, match="stop"), Placement(low_memory=True).use(model):
        raise RuntimeError("stop")
    assert model.weight.data_ptr() == before


@pytest.mark.gpu
def test_low_memory_leaves_the_gpu_empty() -> None:
    pipeline = random_pipeline(placement=Placement("cuda", low_memory=True))
    frames = pipeline.generate(random_prompts(), CONFIG, noise=noise())
    assert all(not x.is_cuda for x in pipeline.transformer.parameters())
    plain = random_pipeline(placement=Placement("cuda"))
    assert_same_frames(frames, plain.generate(random_prompts(), CONFIG, noise=noise()))
    assert all(x.is_cuda for x in plain.transformer.parameters())


def write_checkpoint(folder: Path, pipeline: PyramidFlowPipeline) -> None:
    for name, model, config in (
        ("diffusion_transformer_384p", pipeline.transformer, SMALL),
        (VAE_FOLDER, pipeline.vae, SMALL_VAE),
    ):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(asdict(config)))
        weights = {key: x.contiguous() for key, x in model.state_dict().items()}
        save_file(weights, folder / name / "diffusion_pytorch_model.safetensors")


def test_a_checkpoint(tmp_path: Path) -> None:
    expected = random_pipeline(ops=EAGER)
    write_checkpoint(tmp_path, expected)
    write_flux(tmp_path)
    found = PyramidFlowPipeline.from_pretrained(
        tmp_path, "diffusion_transformer_384p", dtype=torch.float32
    )
    assert found.transformer.ops is FUSED and found.text_encoder is not None
    frames = [x.generate(random_prompts(), CONFIG, noise=noise()) for x in (found, expected)]
    assert_same_frames(*frames)
    low = PyramidFlowPipeline.from_pretrained(
        tmp_path, "diffusion_transformer_384p", with_text_encoder=False
    )
    assert low.text_encoder is None
    assert {x.dtype for x in low.vae.parameters()} == {torch.bfloat16}
    assert low.generate(random_prompts(), CONFIG, noise=noise()).shape == (1, 17, 64, 64, 3)
    with pytest.raises(ValueError, match=r"folder: expected config.json in .*_768p, found none"):
        PyramidFlowPipeline.from_pretrained(tmp_path, "diffusion_transformer_768p")
