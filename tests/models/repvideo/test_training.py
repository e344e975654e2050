"""RepVideo's training objective, and that it trains the gates."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vidgen.ops import EAGER, FUSED
from vidgen.repvideo.model.config import CogVideoXConfig
from vidgen.repvideo.model.transformer import CogVideoXTransformer
from vidgen.repvideo.sampling.schedules import denoiser_table, shifted_alphas
from vidgen.repvideo.training.loss import add_noise, draw_timesteps, drop_text, training_step

TINY = CogVideoXConfig(
    num_attention_heads=1,
    attention_head_dim=16,
    in_channels=2,
    out_channels=2,
    time_embed_dim=8,
    text_embed_dim=6,
    num_layers=8,
    gates=True,
)
TABLE = denoiser_table(shifted_alphas(3.0))


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.portable_only
def test_noise_and_target_turn_into_each_other() -> None:
    """The clean latents are A x_t - sqrt(1 - A^2) v, the noise is sqrt(1 - A^2) x_t + A v."""
    latents, noise = normal(4, 2, 2, 4, 4), normal(4, 2, 2, 4, 4, seed=1)
    timestep = torch.tensor([0, 17, 500, 999])
    noised = add_noise(latents, noise, timestep, TABLE.double())
    signal = TABLE.double()[timestep].view(-1, 1, 1, 1, 1)
    sigma = (1 - signal**2).sqrt()
    torch.testing.assert_close(signal * noised.latents - sigma * noised.target, latents)
    torch.testing.assert_close(sigma * noised.latents + signal * noised.target, noise)
    assert torch.equal(noised.latents[3], noise[3])  # no signal is left at the last timestep
    assert torch.equal(noised.timestep, timestep)


@pytest.mark.portable_only
def test_the_loss_is_that_of_the_clean_latents() -> None:
    model = CogVideoXTransformer(TINY).double()
    latents, noise, text = normal(3, 2, 2, 4, 4), normal(3, 2, 2, 4, 4, seed=1), normal(3, 4, 6)
    timestep = torch.tensor([1, 400, 998])
    noised = add_noise(latents, noise, timestep, TABLE.double())
    result = training_step(model, noised, text)
    signal = TABLE.double()[timestep].view(-1, 1, 1, 1, 1)
    clean = signal * noised.latents - (1 - signal**2).sqrt() * result.velocity
    expected = ((clean - latents) ** 2 / (1 - signal**2)).flatten(1).mean(dim=1)
    assert result.loss.shape == (3,)
    torch.testing.assert_close(result.loss, expected)


@pytest.mark.portable_only
def test_the_loss_of_half_precision_is_wide() -> None:
    model = CogVideoXTransformer(TINY).bfloat16()
    latents, text = normal(1, 2, 2, 4, 4).bfloat16(), normal(1, 4, 6).bfloat16()
    result = training_step(model, add_noise(latents, latents, torch.tensor([9]), TABLE), text)
    assert (result.velocity.dtype, result.loss.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.portable_only
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_a_few_steps_of_training(is_checkpointed: bool) -> None:
    """The loss falls, gates of mixing layers move, those of the others stay; as with eager ops."""
    latents, noise, text = normal(2, 2, 2, 4, 4), normal(2, 2, 2, 4, 4, seed=1), normal(2, 3, 6)
    noised = add_noise(latents, noise, torch.tensor([200, 700]), TABLE)
    losses = {}
    for ops in (EAGER, FUSED):
        torch.manual_seed(0)
        model = CogVideoXTransformer(TINY, ops).double()
        model.gradient_checkpointing = is_checkpointed and ops is FUSED
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
        losses[ops] = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = training_step(model, noised, text).loss.mean()
            loss.backward()
            optimizer.step()
            losses[ops].append(loss.item())
        assert losses[ops][-1] < 0.9 * losses[ops][0]
        moved = (model.get_parameter("learnable_gating") != 0.5).tolist()
        assert moved == [False, False, True, True, True, True, True, False]
    assert losses[FUSED] == pytest.approx(losses[EAGER], rel=1e-7)


@pytest.mark.portable_only
def test_plain_weights_begin_as_plain_and_learn_to_mix() -> None:
    """Gates of 0, which plain checkpoints get, have gradients."""
    model = CogVideoXTransformer(replace(TINY, num_layers=4), FUSED).double()
    with torch.no_grad():
        model.get_parameter("learnable_gating").zero_()
    noised = add_noise(normal(1, 1, 2, 4, 4), normal(1, 1, 2, 4, 4), torch.tensor([5]), TABLE)
    training_step(model, noised, normal(1, 3, 6)).loss.sum().backward()
    gradient = model.get_parameter("learnable_gating").grad
    assert gradient is not None
    assert [x != 0 for x in gradient.tolist()] == [False, False, True, True]


@pytest.mark.portable_only
def test_draws() -> None:
    table = TABLE[:7]
    drawn = draw_timesteps(1000, table, torch.Generator().manual_seed(0))
    assert drawn.shape == (1000,) and set(drawn.tolist()) == set(range(7))
    assert torch.equal(drawn, draw_timesteps(1000, table, torch.Generator().manual_seed(0)))
    text = normal(3, 4, 6)
    dropped = drop_text(text, torch.tensor([False, True, False]))
    assert not dropped[1].any() and torch.equal(dropped[::2], text[::2])


@pytest.mark.portable_only
def test_shapes_that_do_not_fit() -> None:
    latents, timestep = normal(2, 1, 2, 4, 4), torch.tensor([1, 2])
    with pytest.raises(ValueError, match=r"noise: expected shape \[2, 1, 2, 4, 4\]"):
        add_noise(latents, latents[:1], timestep, TABLE)
    with pytest.raises(ValueError, match=r"timestep: expected shape \[2\], got \[1\]"):
        add_noise(latents, latents, timestep[:1], TABLE)
