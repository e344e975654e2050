"""`vidgen analyze`: attention to frames without a map of all tokens, similarity of frames."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vidgen import cli
from vidgen.ops import EAGER, FUSED, Ops
from vidgen.repvideo.analysis.analyze import shares
from vidgen.repvideo.analysis.observe import adjacent_similarity, attention_mass, observed
from vidgen.repvideo.checks.random_weights import SMALL
from vidgen.repvideo.model.layers import Pass, Stream
from vidgen.repvideo.model.transformer import CogVideoXTransformer

BOTH = pytest.mark.parametrize("ops", [EAGER, FUSED], ids=["eager", "fused"])
N_LAYERS = SMALL.num_layers


@BOTH
def test_mass_is_that_of_the_dense_map(ops: Ops) -> None:
    lengths = [3, 4, 4, 4]
    q, k, v = torch.randn(3, 2, 3, 15, 16, dtype=torch.float64)
    actual = attention_mass(3 * q, k, v, lengths, ops)
    weights = (3 * q @ k.mT / 4).softmax(dim=-1).mean(dim=1)
    expected = torch.empty(2, 4, 4, dtype=torch.float64)
    for i, rows in enumerate(weights.split(lengths, dim=1)):
        for j, block in enumerate(rows.split(lengths, dim=2)):
            expected[:, i, j] = block.sum(dim=2).mean(dim=1)
    torch.testing.assert_close(actual.double(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(actual.sum(dim=-1), torch.ones(2, 4))


@pytest.mark.portable_only
def test_similarity_of_adjacent_frames() -> None:
    video = torch.randn(2, 3 * 4, 5)
    frames = video.view(2, 3, 4, 5)
    expected = torch.zeros(2)
    for t in range(2):
        for place in range(4):
            a, b = frames[:, t, place], frames[:, t + 1, place]
            expected += (a * b).sum(dim=1) / a.norm(dim=1) / b.norm(dim=1) / 8
    torch.testing.assert_close(adjacent_similarity(video, 3), expected)
    still = video[:, :4].repeat(1, 3, 1)
    torch.testing.assert_close(adjacent_similarity(still, 3), torch.ones(2))


def call(model: CogVideoXTransformer) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 3, 16, 4, 4, generator=generator)
    text = torch.randn(2, 5, 16, generator=generator)
    with torch.no_grad():
        return model(latents, text, torch.tensor([7, 7]))


@pytest.mark.portable_only
@BOTH
def test_a_model_is_watched_without_being_changed(ops: Ops) -> None:
    """And the last sample is observed, as a map of all its tokens shows it."""
    model = CogVideoXTransformer(SMALL, ops)
    alone = call(model)
    with observed(model) as found:
        assert torch.equal(call(model), alone)
        call(model)
    assert torch.equal(call(model), alone)
    assert found.timesteps == [7, 7] and found.n_frames == 3
    for column, shape in ((found.similarity, ()), (found.attention, (4, 4))):
        assert [[x.shape for x in layers] for layers in column] == [[shape] * N_LAYERS] * 2
    maps: list[Tensor] = []
    outputs: list[Tensor] = []

    def attend(module, args) -> None:
        a, shared, ops = args
        q, k, _ = module.heads(a, shared, ops)
        maps.append((q[-1] @ k[-1].mT / 4).softmax(dim=-1).mean(dim=0))

    def finish(module, args, output: Stream) -> None:
        shared: Pass = args[1]
        outputs.append(output.total(shared.text_length)[-1:, shared.text_length :])

    blocks: Any = model.transformer_blocks
    hooks = [block.attn1.register_forward_pre_hook(attend) for block in blocks]
    hooks += [block.register_forward_hook(finish) for block in blocks]
    call(model)
    for hook in hooks:
        hook.remove()
    lengths = [5, 4, 4, 4]
    for layer in range(N_LAYERS):
        rows = torch.stack([x.sum(dim=1) for x in maps[layer].split(lengths, dim=1)], dim=1)
        expected = torch.stack([x.mean(dim=0) for x in rows.split(lengths)])
        torch.testing.assert_close(found.attention[0][layer], expected, atol=1e-5, rtol=1e-4)
        similarity = adjacent_similarity(outputs[layer], 3)[0]
        torch.testing.assert_close(found.similarity[1][layer], similarity)


@pytest.mark.portable_only
def test_shares_of_attention() -> None:
    attention = torch.rand(2, 5, 5).softmax(dim=-1)
    found = shares(attention)
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(2))
    own = torch.stack([attention[:, t, t] for t in range(1, 5)]).mean(dim=0)
    torch.testing.assert_close(found[:, 1], own)
    far = sum(attention[:, 1 + i, 1 + j] for i in range(4) for j in range(4) if abs(i - j) > 1)
    torch.testing.assert_close(found[:, 3], far / 4)


def analyze(*arguments: object) -> int:
    return cli.main(["analyze", "--random-weights", *map(str, arguments)])


@pytest.mark.portable_only
def test_the_command(tmp_path: Path, capsys) -> None:
    path = tmp_path / "analysis"
    assert analyze("--steps", 2, "--output", path) == 0
    assert capsys.readouterr().out == f"{path}\n"
    names = ["analysis.json", "attention_frames.png", "attention_share.png", "similarity.png"]
    assert sorted(x.name for x in path.iterdir()) == names
    data = json.loads((path / "analysis.json").read_text())
    assert data["timesteps"] == [999, 499]
    assert data["groups"] == ["text", "frame 0", "frame 1", "frame 2"]
    assert torch.tensor(data["similarity"]).shape == (2, N_LAYERS)
    attention = torch.tensor(data["attention"])
    assert attention.shape == (2, N_LAYERS, 4, 4)
    torch.testing.assert_close(attention.sum(dim=-1), torch.ones(2, N_LAYERS, 4))
    for name in names[1:]:
        assert (path / name).read_bytes().startswith(b"\x89PNG")
    assert analyze("--output", path) == 1
    assert capsys.readouterr().err.startswith("vidgen analyze: output: expected a new folder")


@pytest.mark.portable_only
def test_one_frame_has_no_neighbour(tmp_path: Path) -> None:
    assert analyze("--steps", 1, "--frames", 1, "--output", tmp_path / "a") == 0
    assert not (tmp_path / "a" / "similarity.png").exists()
    assert json.loads((tmp_path / "a" / "analysis.json").read_text())["similarity"] is None


@pytest.mark.portable_only
@pytest.mark.parametrize("options", [("--frames", 2)], ids=str)
def test_requests_that_cannot_be_met(options: tuple, tmp_path: Path, capsys) -> None:
    assert analyze(*options, "--output", tmp_path / "a") == 1
    assert "expected 1 " in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
