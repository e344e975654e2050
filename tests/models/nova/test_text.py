"""Text features: tokens of prompts, weights by key, embeddings in files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vidgen.nova.text import (
    TextEncoder,
    load_phi,
    load_text_encoder,
    read_features,
    write_features,
)

pytestmark = pytest.mark.portable_only  # no kernel of ours is in it

CONFIG = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "partial_rotary_factor": 0.5,
    "rope_theta": 10000.0,
    "vocab_size": 40,
}
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def make_tokenizer():
    """One token to a letter; the space is written as byte-level tokenizers do."""
    from transformers import CodeGenTokenizer

    vocab = {token: i for i, token in enumerate([*LETTERS, "Ġ", "<|endoftext|>"])}
    return CodeGenTokenizer(vocab=vocab, merges=[])


@pytest.fixture(scope="module")
def phi():
    """A model made as transformers makes it, with its weights."""
    from transformers import PhiConfig, PhiModel

    torch.manual_seed(0)
    return PhiModel(PhiConfig.from_dict(CONFIG)).eval()


@pytest.fixture(scope="module")
def encoder(phi) -> TextEncoder:
    return TextEncoder(make_tokenizer(), phi, max_length=8)


def features_of(phi, text: str) -> Tensor:
    ids = torch.tensor([[LETTERS.index(letter) for letter in text]])
    with torch.no_grad():
        return phi(input_ids=ids).last_hidden_state[0]


def test_each_prompt_is_encoded_by_itself(encoder: TextEncoder, phi) -> None:
    found = encoder.encode(["abc", "", "hijkl"])
    assert [tuple(x.shape) for x in found] == [(3, 16), (0, 16), (5, 16)]
    for x, text in zip(found[::2], ("abc", "hijkl"), strict=True):
        torch.testing.assert_close(x, features_of(phi, text))


def test_long_prompts_lose_their_end(encoder: TextEncoder, phi) -> None:
    (found,) = encoder.encode([LETTERS])
    torch.testing.assert_close(found, features_of(phi, LETTERS[:8]))


def test_features_are_normalised(encoder: TextEncoder, phi) -> None:
    """They are those after the last norm, which begins as one without scale and shift."""
    (x,) = encoder.encode(["abc"])
    torch.testing.assert_close(x.mean(dim=1), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.var(dim=1, correction=0), torch.ones(3), atol=0.1, rtol=0)


def test_negative_prompts(encoder: TextEncoder) -> None:
    features = encoder.encode_pairs(["abc", "d"])
    assert [len(x) for x in features.prompt] == [3, 1]
    assert [len(x) for x in features.negative] == [0, 0]
    features = encoder.encode_pairs(["abc", "d"], "ef")
    assert torch.equal(features.negative[0], encoder.encode(["ef"])[0])
    assert [len(x) for x in features.negative] == [2, 2]
    assert [len(x) for x in encoder.encode_pairs(["a", "b"], ["", "cde"]).negative] == [0, 3]
    with pytest.raises(ValueError, match="negative prompts: expected 1 or 2, got 3"):
        encoder.encode_pairs(["a", "b"], ["a", "b", "c"])


@pytest.mark.parametrize("prefix", ["", "model."])
def test_weights_by_key(phi, prefix: str) -> None:
    state = {prefix + key: x for key, x in phi.state_dict().items()}
    model = load_phi(CONFIG, state | {"lm_head.weight": torch.zeros(40, 16)})
    ids = torch.arange(6)[None]
    with torch.no_grad():
        found, expected = (m(input_ids=ids).last_hidden_state for m in (model, phi))
    assert torch.equal(found, expected)
    del state[f"{prefix}final_layernorm.bias"]
    with pytest.raises(ValueError, match=r"1 missing: final_layernorm\.bias"):
        load_phi(CONFIG, state)


def test_rotary_angles_stay_in_fp32(phi) -> None:
    model: Any = load_phi(CONFIG, phi.state_dict(), torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.rotary_emb.inv_freq, phi.rotary_emb.inv_freq)
    # half of the 8 dims of a head, in pairs
    torch.testing.assert_close(model.rotary_emb.inv_freq, torch.tensor([1.0, 0.01]))


def test_released_folders(phi, encoder: TextEncoder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected model\.safetensors or .*text_encoder, found"):
        load_text_encoder(tmp_path)
    folder = tmp_path / "text_encoder"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(
        {f"model.{k}": x.clone() for k, x in phi.state_dict().items()}, folder / "model.safetensors"
    )
    with pytest.raises(ValueError, match=r"tokenizer: expected tokenizer\.json or .* in"):
        load_text_encoder(tmp_path)
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    loaded = load_text_encoder(tmp_path, max_length=8)
    for prompt in ("abc", LETTERS, ""):
        assert torch.equal(loaded.encode([prompt])[0], encoder.encode([prompt])[0])


# ---- embeddings in files


def test_features_survive_a_file(encoder: TextEncoder, tmp_path: Path) -> None:
    features = encoder.encode_pairs(["abc", "d"], "ef")
    write_features(tmp_path / "text.safetensors", features)
    found = read_features(load_file(tmp_path / "text.safetensors"), width=16)
    for rows, expected in zip(found, features, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(rows, expected, strict=True))
    with pytest.raises(ValueError, match="output: expected a new file"):
        write_features(tmp_path / "text.safetensors", features)


def test_negative_features_may_be_left_out() -> None:
    prompts = {"prompt_embeds.0": torch.ones(3, 4), "prompt_embeds.1": torch.ones(2, 4)}
    assert [tuple(x.shape) for x in read_features(prompts, 4).negative] == [(0, 4), (0, 4)]
    one = prompts | {"negative_prompt_embeds.0": torch.ones(1, 4)}
    assert [tuple(x.shape) for x in read_features(one, 4).negative] == [(1, 4), (1, 4)]


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({}, r"embeddings: expected prompt_embeds\.0, .* got "),
        ({"prompt_embeds": (3, 4)}, r"expected prompt_embeds\.0, .* got prompt_embeds"),
        ({"prompt_embeds.0": (3, 4), "prompt_embeds.2": (3, 4)}, r"got prompt_embeds\.0, prompt"),
        ({"prompt_embeds.0": (3, 5)}, r"prompt_embeds\.0: expected \[at most 8, 4\], got \[3, 5\]"),
        ({"prompt_embeds.0": (9, 4)}, r"expected \[at most 8, 4\], got \[9, 4\]"),
        ({"prompt_embeds.0": (1, 3, 4)}, r"expected \[at most 8, 4\], got \[1, 3, 4\]"),
        (
            {f"prompt_embeds.{i}": (3, 4) for i in range(3)}
            | {f"negative_prompt_embeds.{i}": (3, 4) for i in range(2)},
            "negative prompts: expected 1 or 3, got 2",
        ),
    ],
)
def test_embeddings_that_are_refused(tensors: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_features({key: torch.zeros(shape) for key, shape in tensors.items()}, 4, 8)
