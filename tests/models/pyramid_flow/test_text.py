"""Pyramid Flow's text encoders: released folders, padding, files of features."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from tests.models.text_encoders import (
    clip_config,
    clip_tokenizer,
    t5,
    t5_tokenizer,
    write_flux,
    write_sd3,
)
from vidgen.pyramid_flow.model.config import FluxConfig
from vidgen.pyramid_flow.text import (
    TEXT_LENGTH,
    Prompts,
    TextEncoder,
    TextFeatures,
    load_text_encoder,
    read_features,
    write_features,
)

pytestmark = pytest.mark.portable_only  # no kernel of ours is in it


@torch.no_grad()
def encode(folder: Path, prompts: list[str]) -> tuple[TextEncoder, TextFeatures]:
    encoder = load_text_encoder(folder, torch.float32)
    return encoder, encoder(prompts)


def test_flux_pools_the_last_token_of_clip(tmp_path: Path) -> None:
    write_flux(tmp_path)
    encoder, (text, mask, pooled) = encode(tmp_path, ["a b c", "d"])
    assert mask is not None
    assert text.shape == (2, TEXT_LENGTH, 10) and mask.shape == (2, TEXT_LENGTH)
    assert mask.sum(dim=1).tolist() == [4, 2]  # including the end token
    (clip,) = encoder.clips
    tokens = torch.tensor([[0, 2, 3, 4, 1, *[1] * 4], [0, 5, 1, *[1] * 6]])
    states = clip(tokens).last_hidden_state
    torch.testing.assert_close(pooled, torch.stack([states[0, 4], states[1, 2]]))


def test_sd3_joins_the_projections_of_two_clips(tmp_path: Path) -> None:
    write_sd3(tmp_path)
    encoder, (_, _, pooled) = encode(tmp_path, ["a b", "c"])
    tokens = torch.tensor([[0, 2, 3, 1, *[1] * 5], [0, 4, 1, *[1] * 6]])
    expected = [clip(tokens).text_embeds for clip in encoder.clips]
    assert pooled.shape == (2, 10)
    torch.testing.assert_close(pooled, torch.cat(expected, dim=1))


def test_weights_named_as_in_the_released_checkpoints(tmp_path: Path) -> None:
    write_flux(tmp_path)
    _, expected = encode(tmp_path, ["a b"])
    path = tmp_path / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    if not any(key.startswith("text_model.") for key in weights):
        weights = {f"text_model.{key}": x for key, x in weights.items()}
    weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(weights, path, metadata={"format": "pt"})
    _, found = encode(tmp_path, ["a b"])
    assert torch.equal(found.pooled, expected.pooled)


def test_text_does_not_depend_on_padding() -> None:
    encoder = TextEncoder(
        t5(), t5_tokenizer(), [CLIPTextModel(clip_config()).eval()], [clip_tokenizer()]
    )
    with torch.no_grad():
        text, mask, _ = encoder(["b a"])
        assert mask is not None
        alone = encoder.t5(torch.tensor([[4, 3, 1]])).last_hidden_state
        torch.testing.assert_close(text[mask.bool()], alone[0])
        # a prompt that is too long is cut and still gets its end token
        long, mask, _ = encoder(["a " * 200])
    assert mask.all() and long.shape == (1, TEXT_LENGTH, 10)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("text_encoder_2/config.json", "folder: expected config.json in .*text_encoder_2, found"),
        ("text_encoder/model.safetensors", "text encoder: expected weights in .*text_encoder"),
        ("tokenizer_2/tokenizer.json", "tokenizer: expected tokenizer.json or .* in .*tokenizer_2"),
    ],
)
def test_missing_files(tmp_path: Path, missing: str, message: str) -> None:
    write_flux(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(ValueError, match=message):
        load_text_encoder(tmp_path, torch.float32)


def test_missing_weights(tmp_path: Path) -> None:
    write_flux(tmp_path)
    CLIPTextModel(clip_config()).save_pretrained(tmp_path / "text_encoder")
    config = clip_config()
    config.num_hidden_layers = 2
    config.save_pretrained(tmp_path / "text_encoder")
    with pytest.raises(ValueError, match=r"text encoder: expected all weights .* got none for .*1"):
        load_text_encoder(tmp_path, torch.float32)


def features(n: int = 1, width: int = 8) -> TextFeatures:
    return TextFeatures(torch.randn(n, 5, width), torch.ones(n, 5).long(), torch.randn(n, 3))


@pytest.mark.parametrize("with_negative", [True, False])
def test_features_to_a_file_and_back(tmp_path: Path, with_negative: bool) -> None:
    path = tmp_path / "features.safetensors"
    prompts = Prompts(features(), features() if with_negative else None)
    write_features(path, prompts)
    config = FluxConfig(joint_attention_dim=8, pooled_projection_dim=3)
    found = read_features(load_file(path), config)
    assert (found.negative is not None) == with_negative
    for expected, got in zip(prompts, found, strict=True):
        for x, y in zip(expected or (), got or (), strict=True):
            assert x is not None and y is not None and torch.equal(x, y)
    with pytest.raises(ValueError, match=r"output: expected a new file, .*features.safetensors"):
        write_features(path, prompts)


def test_bad_features() -> None:
    config = FluxConfig(joint_attention_dim=8, pooled_projection_dim=3)
    good = {"prompt.text": torch.zeros(2, 5, 8), "prompt.text_mask": torch.ones(2, 5)}
    good["prompt.pooled"] = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"embeddings: expected prompt.text, .* got nothing"):
        read_features({}, config)
    with pytest.raises(ValueError, match=r"embeddings: expected .* got negative.text, prompt"):
        read_features(good | {"negative.text": torch.zeros(2, 5, 8)}, config)
    for name, x, message in (
        ("text", torch.zeros(2, 5, 9), r"prompt.text: expected shape \[2, 5, 8\], got \[2, 5, 9\]"),
        ("text_mask", torch.zeros(1, 5), r"prompt.text_mask: expected shape \[2, 5\]"),
        ("pooled", torch.zeros(2, 4), r"prompt.pooled: expected shape \[2, 3\], got \[2, 4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            read_features(good | {f"prompt.{name}": x}, config)
