"""NOVA's training objective: its definition, equal in the released order, at once by sets."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vidgen.nova.checks.golden_training import training_schedule
from vidgen.nova.model.config import Arch, Decoder, Encoder, NovaConfig
from vidgen.nova.model.embeddings import patchify
from vidgen.nova.model.transformer import NovaTransformer
from vidgen.nova.sampling.schedules import DDPM, FlowMatching, Schedule, set_sizes
from vidgen.nova.training.loss import (
    TrainingDraws,
    add_noise,
    diffusion_losses,
    draw,
    drop_labels,
    drop_texts,
    frame_conditions,
    freeze,
    is_visible,
    spatial_features,
    training_step,
)
from vidgen.ops import EAGER, FUSED

CONFIG = NovaConfig(
    image_dim=3,
    image_size=(32, 64),
    text_token_dim=6,
    text_token_len=2,
    video_base_size=(4, 1, 2),
    video_mixer_rank=2,
    arch=Arch(Encoder(1, 24, 2), Encoder(2, 24, 2, 1), Decoder(1, 20)),
)
BY_SETS = replace(CONFIG, spatial_attention="set_causal")
IMAGE = replace(CONFIG, video_base_size=(1, 1, 2), video_mixer_rank=None)
SCHEDULES = {
    "flow": FlowMatching(shift=2.0),
    "ddpm": DDPM(beta_schedule="squaredcos_cap_v2"),
    "short": FlowMatching(num_train_timesteps=40),  # fewer levels than tokens: a table of them
}


def model_of(config: NovaConfig, ops=EAGER) -> NovaTransformer:
    torch.manual_seed(0)
    return NovaTransformer(config, ops).double().train()


def inputs(config: NovaConfig, n_frames: int, n_rows: int = 2) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    size = n_rows, config.image_dim, n_frames, *config.latent_size
    latents = torch.randn(size, generator=generator, dtype=torch.float64)
    texts = [torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in range(n_rows)]
    return latents, texts


def step(
    model: NovaTransformer,
    schedule: Schedule,
    n_frames: int = 2,
    sizes: tuple[int, ...] = (),
    official_order: bool = False,
):
    """Losses by name, then the gradients of their sum by parameter."""
    latents, texts = inputs(model.config, n_frames)
    draws = draw(latents, model, schedule, seed=3, repeats=2)
    losses = training_step(
        model,
        latents,
        model.condition(texts),
        draws,
        schedule,
        set_sizes=sizes,
        official_order=official_order,
    )
    losses.total.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return losses.terms, grads


def assert_same(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.portable_only
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("config", [CONFIG, IMAGE], ids=["video", "image"])
def test_hoisted_and_skipped_is_the_released_order(name: str, config: NovaConfig) -> None:
    n_frames = 3 if config is CONFIG else 1
    expected = step(model_of(config), SCHEDULES[name], n_frames, official_order=True)
    assert expected[0].keys() == ({"loss_t2i", "loss_i2i"} if n_frames > 1 else {"loss"})
    for ops in (EAGER, FUSED):
        assert_same(step(model_of(config, ops), SCHEDULES[name], n_frames), expected)


def test_fused_is_eager() -> None:
    expected = step(model_of(CONFIG), SCHEDULES["flow"], official_order=True)
    assert_same(step(model_of(CONFIG, FUSED), SCHEDULES["flow"]), expected)


@pytest.mark.portable_only
def test_training_by_sets() -> None:
    """All tokens are asked for; the mask token is what asks."""
    sizes = tuple(set_sizes(CONFIG.n_tokens, 3))
    expected = step(model_of(BY_SETS), SCHEDULES["flow"], sizes=sizes)
    assert_same(step(model_of(BY_SETS, FUSED), SCHEDULES["flow"], sizes=sizes), expected)
    assert_same(
        step(model_of(BY_SETS), SCHEDULES["flow"], sizes=sizes, official_order=True), expected
    )
    assert expected[1]["mask_embed.mask_token"].abs().amax() > 0
    with pytest.raises(ValueError, match="set_sizes: expected 8 tokens in all, got 0"):
        step(model_of(BY_SETS), SCHEDULES["flow"])


@pytest.mark.portable_only
@pytest.mark.parametrize("name", ["flow", "ddpm"])
def test_loss_by_its_definition(name: str) -> None:
    model, schedule = model_of(CONFIG), SCHEDULES[name]
    latents, texts = inputs(CONFIG, 3)
    draws = draw(latents, model, schedule, seed=3, repeats=2)
    frames = latents.transpose(1, 2).flatten(0, 1)
    conditions = frame_conditions(model, latents, model.condition(texts)).flatten(0, 1)
    z = spatial_features(model, frames, conditions, draws)
    losses = diffusion_losses(model, z, frames, 3, draws, schedule)

    tokens, visible = patchify(frames, 2), is_visible(draws)
    n_asked = 2 * int((~visible).sum())
    by_frame, decoder = [0.0, 0.0, 0.0], model.image_decoder
    for row in range(12):
        frame = row % 6  # repeats go around all frames, frames around clips
        for i in (~visible[frame]).nonzero()[:, 0].tolist():
            k, noise, x = int(draws.index[row, i]), draws.noise[row, i], tokens[frame, i]
            if name == "ddpm":
                alpha = schedule.alphas_cumprod[k].double()
                t, noised, target = float(k), alpha.sqrt() * x + (1 - alpha).sqrt() * noise, noise
            else:
                s = (1000 - k) / 1000
                s = torch.tensor(2 * s / (1 + s)).float().double()
                t, noised, target = 1000 * float(s), s * noise + (1 - s) * x, noise - x
            c = decoder.embed_condition(z[frame, i]) + decoder.embed_time(torch.tensor(t))
            prediction = decoder(noised[None, None], c[None, None])
            by_frame[frame % 3] += (prediction - target).square().mean().item() / n_asked
    torch.testing.assert_close(
        [x.item() for x in losses.terms.values()],
        [3 * by_frame[0], 3 / 2 * (by_frame[1] + by_frame[2])],
        rtol=1e-4,  # the 1e-5 beside the number of tokens, and timesteps in fp32
        atol=0,
    )


@pytest.mark.portable_only
def test_draws() -> None:
    model = model_of(CONFIG)
    latents, _ = inputs(CONFIG, 2)
    draws = draw(latents, model, SCHEDULES["flow"], seed=0)
    again = draw(latents, model, SCHEDULES["flow"], seed=torch.Generator().manual_seed(0))
    assert all(
        torch.equal(torch.as_tensor(a), torch.as_tensor(b))
        for a, b in zip(draws, again, strict=True)
    )
    assert draws.noise.shape == (16, 8, 12) and draws.noise.dtype == torch.float64
    assert draws.index.shape == (16, 8)
    assert torch.equal(draws.order.sort(dim=1).values, torch.arange(8).expand(4, -1))
    counts = {draw(latents, model, SCHEDULES["flow"], seed).n_visible for seed in range(40)}
    assert counts == {0, 1, 2}  # of 8 tokens at most 30 percent
    assert draw(latents, model_of(BY_SETS), SCHEDULES["flow"], seed=1).n_visible == 0

    many = latents.new_zeros(64, 3, 8, 4, 8)
    levels = {name: draw(many, model, SCHEDULES[name], 0).index for name in ("flow", "ddpm")}
    for index in levels.values():
        assert index.min() >= 0 and index.max() <= 999
    uniform, middle = levels["ddpm"].double(), levels["flow"].double()
    assert uniform.std().item() == pytest.approx(1000 / math.sqrt(12), rel=0.03)
    assert middle.std().item() == pytest.approx(208, rel=0.03)  # of sigmoid(normal)


@pytest.mark.portable_only
def test_noising_runs_from_data_to_noise() -> None:
    tokens, noise = torch.ones(1, 2, 12), torch.zeros(1, 2, 12)
    flow, n = FlowMatching(), 1000
    draws = TrainingDraws(torch.arange(2)[None], 0, noise, torch.tensor([[0, n - 1]]))
    noised, timestep, target = add_noise(tokens, draws, flow)
    assert timestep.tolist() == [[1000.0, 1.0]]
    torch.testing.assert_close(noised[0, :, 0], torch.tensor([0.0, 0.999]))
    torch.testing.assert_close(target, noise - tokens)
    noised, timestep, target = add_noise(tokens, draws, DDPM())
    assert timestep.tolist() == [[0.0, 999.0]] and target is noise
    torch.testing.assert_close(noised[0, :, 0], DDPM().alphas_cumprod[[0, 999]].sqrt())
    with pytest.raises(ValueError, match="prediction_type: expected 'epsilon'"):
        add_noise(tokens, draws, DDPM(prediction_type="sample"))


@pytest.mark.portable_only
def test_samples_without_a_condition() -> None:
    model, (_, texts) = model_of(CONFIG), inputs(CONFIG, 1, n_rows=3)
    dropped = model.condition(drop_texts(texts, torch.tensor([False, True, True])))
    full = model.condition(texts)
    assert_same(dropped[:2], full[[0, 0]])  # the first text is empty
    assert not torch.equal(dropped[2], full[2])
    labels = drop_labels(torch.tensor([3, 7]), torch.tensor([True, False]))
    assert labels.tolist() == [1000, 7]


@pytest.mark.portable_only
def test_frozen_parameters() -> None:
    model = model_of(CONFIG)
    names = freeze(model)
    assert {name.split(".")[0] for name in names} == {"motion_embed", "text_embed"}
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {*names}
    image = freeze(model_of(IMAGE))
    prefixes = ("text_embed.norm", "video_pos_embed.", "video_encoder.patch_embed.")
    assert all(name.startswith(prefixes) for name in image) and len(image) == 10
    by_class = replace(IMAGE, text_token_dim=None, rotary_pos_embed=False)
    assert len(freeze(model_of(by_class))) == 8


@pytest.mark.portable_only
def test_a_step_trains() -> None:
    model, schedule = model_of(CONFIG, FUSED), SCHEDULES["flow"]
    freeze(model)
    latents, texts = inputs(CONFIG, 2)
    draws = draw(latents, model, schedule, seed=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.02)
    totals = []
    for _ in range(8):
        total = training_step(model, latents, model.condition(texts), draws, schedule).total
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.8 * totals[0]


@pytest.mark.portable_only
def test_frame_conditions_compile_as_one_graph() -> None:
    model, (latents, texts) = model_of(CONFIG, FUSED), inputs(CONFIG, 2, n_rows=1)
    with torch.no_grad():
        condition = model.condition(texts)
        compiled = torch.compile(frame_conditions, backend="aot_eager", fullgraph=True)
        expected = frame_conditions(model, latents, condition)
        assert_same(compiled(model, latents, condition), expected)


@pytest.mark.portable_only
def test_inputs_that_do_not_fit() -> None:
    model, schedule = model_of(CONFIG), SCHEDULES["flow"]
    latents, texts = inputs(CONFIG, 2)
    draws, condition = draw(latents, model, schedule, seed=0), model.condition(texts)
    with pytest.raises(ValueError, match=r"latents: expected shape \[B, 3, T, 4, 8\], got"):
        training_step(model, latents[..., :4], condition, draws, schedule)
    with pytest.raises(ValueError, match=r"condition: expected shape \[2, Lc, 24\], got"):
        training_step(model, latents, condition[:1], draws, schedule)
    with pytest.raises(ValueError, match="class: expected ddpm or flow_matching, got 'edm'"):
        training_schedule({"class": "edm"})
    with pytest.raises(ValueError, match=r"draws.order: expected shape \[2, 8\], got \[4, 8\]"):
        training_step(model, latents[:, :, :1], condition, draws, schedule)
