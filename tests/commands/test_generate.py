"""`vidgen generate` makes what was asked for, or says in one line why not."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from vidgen import cli
from vidgen.common.checkpoint import write_state_dict
from vidgen.common.media import read_frames
from vidgen.nova.checks.random_weights import SMALL as NOVA
from vidgen.pyramid_flow import generate as pyramid_flow
from vidgen.pyramid_flow.checks.random_weights import random_prompts
from vidgen.pyramid_flow.text import NEGATIVE_PROMPT, PARTS
from vidgen.repvideo.checks.random_weights import SMALL as REPVIDEO

pytestmark = pytest.mark.portable_only

STEPS = {
    "repvideo": ["--steps", "2"],
    "pyramid-flow": ["--steps", "1", "--video-steps", "1"],
    "nova": ["--steps", "1", "--sets", "2"],
}


def generate(model: str, output: Path, *options: str) -> int:
    common = ["generate", model, "--random-weights", *STEPS[model], "--output", str(output)]
    return cli.main([*common, *options])


@pytest.mark.parametrize(
    ("model", "counts"),
    [("repvideo", (1, 9, 17)), ("pyramid-flow", (1, 9, 17)), ("nova", (1, 5, 9, 13))],
)
def test_as_many_frames_as_asked_for(model: str, counts: tuple[int, ...], tmp_path: Path) -> None:
    for n in counts:
        path = tmp_path / f"{n}.mp4"
        assert generate(model, path, "--frames", str(n)) == 0
        assert len(read_frames(path)) == n


@pytest.mark.parametrize("n", [5, 13, 21])
def test_frames_that_repvideos_vae_cannot_make(n: int, tmp_path: Path, capsys) -> None:
    """An even number of latent frames: it would make 8, 16 or 24 frames of them."""
    assert generate("repvideo", tmp_path / "a.mp4", "--frames", str(n)) == 1
    expected = f"expected 1 + a multiple of 8, as the VAE decodes them, such as {n - 4} or {n + 4}"
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_another_number_of_frames_is_told(tmp_path: Path, monkeypatch, capsys) -> None:
    """Once, for all models; the video is kept."""
    monkeypatch.setattr("vidgen.nova.generate.count_frames", lambda args: 6)
    assert generate("nova", tmp_path / "a.mp4", "--frames", "5") == 1
    assert "expected 6 frames, the model made 5" in capsys.readouterr().err
    assert len(read_frames(tmp_path / "a.mp4")) == 5


def several_prompts(model: str) -> dict[str, Tensor]:
    if model == "repvideo":
        shape = 2, REPVIDEO.max_text_seq_length, REPVIDEO.text_embed_dim
        return {name: torch.randn(shape) for name in ("prompt_embeds", "negative_prompt_embeds")}
    if model == "nova":
        return {f"prompt_embeds.{i}": torch.randn(3, NOVA.text_token_dim or 1) for i in range(2)}
    prompts = random_prompts(pyramid_flow.random_pipeline().transformer.config)
    return {
        f"{name}.{part}": torch.cat([x, x])
        for name, features in zip(("prompt", "negative"), prompts, strict=True)
        for part, x in zip(PARTS, features, strict=True)
    }


@pytest.mark.parametrize("model", STEPS)
def test_features_of_several_prompts_are_refused(model: str, tmp_path: Path, capsys) -> None:
    write_state_dict(tmp_path / "a.safetensors", several_prompts(model))
    options = ["--embeddings", str(tmp_path / "a.safetensors")]
    assert generate(model, tmp_path / "a.mp4", *options) == 1
    assert "embeddings: expected features of one prompt, got 2" in capsys.readouterr().err
    assert not (tmp_path / "a.mp4").exists()


@pytest.mark.parametrize(("given", "expected"), [(None, NEGATIVE_PROMPT), ("", ""), ("x", "x")])
def test_an_empty_negative_prompt_is_empty(given: str | None, expected: str) -> None:
    """Pyramid Flow has a long one by default."""
    asked = []
    pipeline = SimpleNamespace(
        transformer=SimpleNamespace(config=None),
        text_encoder=None,
        encode_prompts=lambda prompts, negative: asked.append(negative),
    )
    run = SimpleNamespace(
        checkpoint=Path("a"), prompt="a boat", negative_prompt=given, embeddings=None
    )
    pyramid_flow._prompts(pipeline, run)
    assert asked == [expected]


def test_the_command_tells_no_negative_prompt_from_an_empty_one(monkeypatch) -> None:
    found = []

    def note(args, run) -> None:
        found.append(run.negative_prompt)
        raise ValueError("that is all")

    monkeypatch.setattr("vidgen.nova.generate.generate", note)
    for options in ([], ["--negative-prompt", ""]):
        assert generate("nova", Path("a.mp4"), *options) == 1
    assert found == [None, ""]
