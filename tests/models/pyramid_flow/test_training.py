"""Pyramid Flow's loss, the history of mixed resolutions, and loading checkpoints."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.paths import GOLDEN
from vidgen.commands.verify import find_cases
from vidgen.common.checkpoint import load_exactly
from vidgen.ops import EAGER, FUSED
from vidgen.pyramid_flow.checks.example import example_model
from vidgen.pyramid_flow.checks.golden_models import layouts, train, train_full
from vidgen.pyramid_flow.model.config import FluxConfig, MMDiTConfig
from vidgen.pyramid_flow.model.history import (
    count_units,
    history_layout,
    training_units,
    unit_frames,
)
from vidgen.pyramid_flow.model.weights import load_pretrained, load_transformer
from vidgen.pyramid_flow.sampling.scheduler import PyramidFlowScheduler
from vidgen.pyramid_flow.text import TextFeatures
from vidgen.pyramid_flow.training.loss import (
    TrainingConfig,
    balance,
    column_tokens,
    draw,
    drop_prompts,
    training_columns,
    training_step,
)

CASES = {case.path.stem: case for case in find_cases(GOLDEN / "pyramid_flow")}
CONFIG = FluxConfig(
    in_channels=16,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=12,
    num_attention_heads=2,
    joint_attention_dim=10,
    pooled_projection_dim=6,
    axes_dims_rope=(4, 4, 4),
)
RAW = {  # config.json as stored
    "_class_name": "PyramidFluxTransformer",
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 12,
    "num_attention_heads": 2,
    "joint_attention_dim": 10,
    "pooled_projection_dim": 6,
    "axes_dims_rope": [4, 4, 4],
    "patch_size": 1,
}
SCHEDULER = PyramidFlowScheduler()


def random_batch(n_samples: int, n_frames: int, dtype=torch.float64) -> tuple[Tensor, TextFeatures]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    mask = (torch.arange(5) < 1 + torch.arange(n_samples)[:, None] % 5).long()
    text = TextFeatures(normal(n_samples, 5, 10), mask, normal(n_samples, 6))
    return normal(n_samples, 4, n_frames, 8, 16), text


# ---- history


@pytest.mark.portable_only
def test_history_layout_is_the_official_one() -> None:
    case = CASES["history_layout"]
    found = layouts(case.config, {}, {}, EAGER)
    assert found.keys() == case.tables.keys()
    assert all(torch.equal(found[name], x) for name, x in case.tables.items())


@pytest.mark.portable_only
@pytest.mark.parametrize("per_unit", [1, 2, 3])
def test_history_holds_every_frame_once(per_unit: int) -> None:
    for unit in range(7):
        for stage in range(4):
            clips = history_layout(unit, stage, per_unit)
            frames = [f for clip in clips for f in clip.frames]
            assert frames == list(range(unit_frames(unit, per_unit).start))
            levels = [clip.level for clip in clips]
            assert levels == sorted(levels) and all(x <= stage for x in levels)
            if unit:
                assert (clips[-1].level, clips[-1].frames) == (
                    stage,
                    unit_frames(unit - 1, per_unit),
                )
    assert count_units(1 + 4 * per_unit, per_unit) == 5


@pytest.mark.portable_only
def test_long_small_sequences_go_with_short_large_ones() -> None:
    """Over ranks and steps, the highest resolution gets every length equally often."""
    seen = []
    for step in (1, 2):
        for rank in range(8):
            low, mid, high = training_units(3, 16, step=step, rank=rank, sync_group=8)
            assert low == mid == 17 - high
            seen.append(high)
    assert sorted(seen) == list(range(1, 17))
    assert training_units(3, 8, step=1, sync_group=4) == [4, 4, 5]
    with pytest.raises(ValueError, match="at most 4 ranks"):
        training_units(3, 4, step=1, sync_group=8)
    with pytest.raises(ValueError, match="multiple of 2 more, got 4"):
        count_units(4, 2)


# ---- the objective


@pytest.mark.portable_only
@pytest.mark.parametrize("name", ["flux_train_ar", "flux_train_full", "mmdit_train_ar"])
@pytest.mark.parametrize("ops", [EAGER, FUSED], ids=["eager", "fused"])
def test_all_gradients_have_the_official_norms(name: str, ops) -> None:
    case = CASES[name]
    recompute = train_full if case.kind == "train_full" else train
    w, inputs = (case.tensors(prefix, "cpu", torch.float32) for prefix in ("w.", "in."))
    found = recompute(case.config, w, inputs, ops)
    norms = json.loads(case.path.read_text())["grad_norms"]
    assert norms.keys() == {k.removeprefix("grad.") for k in found if k.startswith("grad.")}
    for key, norm in norms.items():
        assert found[f"grad.{key}"].norm().item() == pytest.approx(norm, rel=2e-4, abs=1e-7)


@pytest.mark.portable_only
@pytest.mark.parametrize("full_sequence", [False, True])
@pytest.mark.parametrize("per_unit", [1, 2])
def test_inputs_and_targets_say_what_they_should(full_sequence: bool, per_unit: int) -> None:
    """Inputs and targets follow from the definitions of start, end and target."""
    config = TrainingConfig((1, 2, 1), frames_per_unit=per_unit, full_sequence=full_sequence)
    latents, _ = random_batch(8, 7)
    units = [3, 3, 2]
    draws = draw(latents, config, units, 1)
    columns = training_columns(latents, draws, config, SCHEDULER, units, FUSED)
    assert [column.timestep.shape for column in columns] == [(2,)] * 4

    def level(x: Tensor, stage: int) -> Tensor:
        for _ in range(2 - stage):
            x = x.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).mean(dim=(-3, -1))
        return x

    for c, (stage, column) in enumerate(zip(config.stages, columns, strict=True)):
        frames = range(7) if full_sequence else unit_frames(units[stage] - 1, per_unit)
        part = (slice(None), slice(None), slice(frames.start, frames.stop))
        x, noise = latents[c::4][part], draws[c].noise[part]
        noise, clean = level(noise, stage) * 2.0 ** (2 - stage), level(x, stage)
        start, end = SCHEDULER.start_sigmas[stage], SCHEDULER.end_sigmas[stage]
        before = level(clean, 1).repeat_interleave(2, -1).repeat_interleave(2, -2)
        first = noise if stage == 0 else start * noise + (1 - start) * before
        last = end * noise + (1 - end) * clean
        r = column.sigma.reshape(-1, 1, 1, 1, 1)
        torch.testing.assert_close(column.target, first - last)
        torch.testing.assert_close(column.clips[-1], r * first + (1 - r) * last)
        history = [] if full_sequence else history_layout(units[stage] - 1, stage, per_unit)
        assert len(column.clips) == len(history) + 1
        corruption = (draws[c].corruption.double() / 3).reshape(-1, 1, 1, 1, 1)
        for i, clip in enumerate(history):
            drawn = draws[c].history_noise[len(history) - 1 - i]
            x = level(latents[c::4, :, clip.frames.start : clip.frames.stop], clip.level)
            torch.testing.assert_close(column.clips[i], corruption * drawn + (1 - corruption) * x)


@pytest.mark.portable_only
def test_frames_that_fill_no_unit_are_left_out() -> None:
    config, units = TrainingConfig((1, 1, 1), frames_per_unit=2), [9, 9, 9]
    latents, _ = random_batch(3, 6)
    draws = draw(latents, config, units, 1)
    columns = training_columns(latents, draws, config, SCHEDULER, units, FUSED)
    shorter = [drawn._replace(noise=drawn.noise[:, :, :5]) for drawn in draws]
    expected = training_columns(latents[:, :, :5], shorter, config, SCHEDULER, units, FUSED)
    for column, other in zip(columns, expected, strict=True):
        for x, y in zip(column.clips, other.clips, strict=True):
            assert torch.equal(x, y)


@pytest.mark.portable_only
def test_time_covers_the_stage() -> None:
    config = TrainingConfig((1, 1, 1))
    latents, _ = random_batch(6, 1)
    draws = draw(latents, config, [1, 1, 1], 0)
    for column in draws:
        column.time.copy_(torch.tensor([0.0, 1.0 - 2**-24]))
    bounds = [(1000.0, 744.256), (744.0, 386.358), (386.0, 1.385)]
    columns = training_columns(latents, draws, config, SCHEDULER, [1, 1, 1], FUSED)
    for column, expected in zip(columns, bounds, strict=True):
        assert column.timestep.tolist() == pytest.approx(expected, abs=1e-4)
        assert column.sigma.tolist() == pytest.approx((1.0, 0.001))


@pytest.mark.portable_only
def test_draws_repeat_and_may_be_injected() -> None:
    config, units = TrainingConfig((1, 2, 1)), [3, 3, 4]
    latents, _ = random_batch(8, 4)
    a, b, c = (draw(latents, config, units, seed) for seed in (1, 1, 2))
    flat = [[x for column in d for x in (*column[:3], *column.history_noise)] for d in (a, b, c)]
    assert all(torch.equal(x, y) for x, y in zip(flat[0], flat[1], strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(flat[0], flat[2], strict=True))
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(draw(latents, config, units, generator)[0].noise, a[0].noise)
    training_columns(latents, a, config, SCHEDULER, units, FUSED)
    with pytest.raises(ValueError, match="multiple of 4 samples, got 7"):
        draw(latents[:7], config, units, 1)


@pytest.mark.portable_only
def test_images_and_videos_in_one_step() -> None:
    """The loss of packed columns of images and videos is the mean of the losses of each alone."""
    model = example_model(CONFIG, FUSED, dtype=torch.float64)
    columns, texts = [], []
    for n_frames, ratios in ((1, (1, 1, 1)), (4, (1, 0, 1))):
        config = TrainingConfig(ratios)
        latents, given = random_batch(len(config.stages), n_frames)
        draws = draw(latents, config, [4, 4, 4], n_frames)
        columns += training_columns(latents, draws, config, SCHEDULER, [4, 4, 4], FUSED)
        texts.append(given)
    together = TextFeatures(*(torch.cat(x) for x in zip(*texts, strict=True)))
    with torch.no_grad():
        packed = training_step(model, columns, together).loss
        alone = [
            training_step(model, [column], TextFeatures(*(x[i : i + 1] for x in together))).loss
            for i, column in enumerate(columns)
        ]
    torch.testing.assert_close(packed, torch.stack(alone).mean())


@pytest.mark.portable_only
def test_learning_lowers_the_loss() -> None:
    torch.manual_seed(0)
    model = example_model(CONFIG, FUSED, dtype=torch.float32)
    config, units = TrainingConfig((1, 2, 1)), [2, 2, 2]
    latents, text = random_batch(4, 2, torch.float32)
    draws = draw(latents, config, units, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    losses = []
    for _ in range(20):
        columns = training_columns(latents, draws, config, SCHEDULER, units, FUSED)
        loss = training_step(model, columns, text).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.portable_only
def test_dropped_prompts_are_the_empty_one() -> None:
    _, text = random_batch(4, 1)
    empty = TextFeatures(torch.zeros(1, 5, 10).double(), torch.ones(1, 5).long(), torch.ones(1, 6))
    drop = torch.tensor([True, False, False, True])
    dropped = drop_prompts(text, empty, drop)
    for x, given, replacement in zip(dropped, text, empty, strict=True):
        assert torch.equal(x[1:3], given[1:3])
        assert (x[[0, 3]] == replacement).all()
    with pytest.raises(ValueError, match=r"empty text: expected \[5, 10\] in a row, got \[1, 10\]"):
        drop_prompts(text, empty._replace(features=torch.zeros(1, 1, 10)), drop)


@pytest.mark.portable_only
def test_no_mask_is_one_without_padding() -> None:
    _, text = random_batch(2, 1)
    short = TextFeatures(torch.zeros(1, 5, 10), torch.tensor([[1, 0, 0, 0, 0]]), torch.ones(1, 6))
    drop = torch.tensor([True, False])
    dropped = drop_prompts(text._replace(mask=None), short, drop)
    assert dropped.mask.tolist() == [[1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]
    dropped = drop_prompts(text, short._replace(mask=None), drop)
    assert dropped.mask.tolist() == [[1, 1, 1, 1, 1], text.mask[1].tolist()]
    neither = (x._replace(mask=None) for x in (text, short))
    assert drop_prompts(*neither, drop).mask is None


@pytest.mark.portable_only
def test_column_tokens() -> None:
    """384p: 60, 240 and 960 tokens a frame."""
    config = TrainingConfig()
    for units, stage, expected in ((1, 0, 60), (1, 2, 960), (6, 1, 480 + 240), (16, 2, 2940)):
        assert column_tokens(48, 80, stage, units, config) == expected
    whole = TrainingConfig(frames_per_unit=2, full_sequence=True)  # 7 frames of one size
    assert column_tokens(48, 80, 1, 4, whole) == 7 * 240


@pytest.mark.portable_only
def test_balance() -> None:
    counts = [4000, 128, 128, 1000, 1000, 900, 4000, 60]
    shares = balance(counts, 3)
    assert sorted(i for share in shares for i in share) == list(range(len(counts)))
    totals = [sum(counts[i] for i in share) for share in shares]
    assert sorted(totals) == [3216, 4000, 4000]
    assert balance([5, 5], 3) == [[0], [1], []]
    with pytest.raises(ValueError, match="got 0"):
        balance([1], 0)


# ---- checkpoints


@pytest.mark.portable_only
def test_checkpoints_load_by_their_keys(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = example_model(CONFIG, EAGER)
    state = model.state_dict()
    (tmp_path / "config.json").write_text(json.dumps(RAW))
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    loaded = load_pretrained(tmp_path, FUSED)
    assert loaded.config == CONFIG and loaded.ops is FUSED
    assert all(torch.equal(x, state[k]) for k, x in loaded.state_dict().items())

    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    prefixed = {f"dit.{k}": x.bfloat16() for k, x in state.items()}
    others = {"vae.encoder.weight": torch.ones(1), "text_encoder_2.bias": torch.ones(1)}
    torch.save(prefixed | others, tmp_path / "diffusion_pytorch_model.bin")
    loaded = load_pretrained(tmp_path, use_gradient_checkpointing=True)
    assert loaded.config.use_gradient_checkpointing
    assert all(x.dtype == torch.bfloat16 for x in loaded.parameters())
    (tmp_path / "diffusion_pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="found none"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"expected config\.json"):
        load_pretrained(tmp_path)


@pytest.mark.portable_only
def test_checkpoints_that_do_not_fit() -> None:
    state = example_model(CONFIG, EAGER).state_dict()
    with pytest.raises(ValueError, match=r"1 missing: x_embedder\.bias"):
        load_transformer(RAW, {k: x for k, x in state.items() if k != "x_embedder.bias"})
    with pytest.raises(ValueError, match="1 left over: surprise"):
        load_transformer(RAW, state | {"surprise": torch.ones(1)})
    with pytest.raises(ValueError, match=r"x_embedder\.bias of shape \[24\], got \[3\]"):
        load_transformer(RAW, state | {"x_embedder.bias": torch.ones(3)})
    with pytest.raises(ValueError, match=r"6 missing: .* and 1 more"):
        load_exactly(torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(3)]), {})


BAD_CONFIGS = {
    "unknown": ({"n_experts": 8}, r"n_experts"),
    "patch": ({"patch_size": 4}, "patch_size: expected 1, got 4"),
    "axes": ({"axes_dims_rope": [4, 4, 8]}, r"sum to attention_head_dim 12, got \[4, 4, 8\]"),
    "channels": ({"in_channels": 18}, "multiple of 4, got 18"),
}


@pytest.mark.portable_only
@pytest.mark.parametrize("bad", BAD_CONFIGS)
def test_configs_that_are_not_built(bad: str) -> None:
    change, message = BAD_CONFIGS[bad]
    with pytest.raises(ValueError, match=message):
        FluxConfig.from_dict(RAW | change)


@pytest.mark.portable_only
def test_configs() -> None:
    assert FluxConfig.from_dict(RAW) == CONFIG
    assert not FluxConfig.from_dict(RAW | {"use_flash_attn": True}).use_temporal_causal
    assert MMDiTConfig.from_dict({"use_t5_mask": False}) == MMDiTConfig()  # nothing reads it
    with pytest.raises(ValueError, match="temp_pos_embed_type: expected 'rope', got 'sincos'"):
        MMDiTConfig.from_dict({"temp_pos_embed_type": "sincos"})
    with pytest.raises(ValueError, match="caption_projection_dim: expected 1536, got 1152"):
        MMDiTConfig.from_dict({"caption_projection_dim": 1152})


@pytest.mark.portable_only
@pytest.mark.parametrize("ratios", [(1,), (1, 1), (2, 1, 1, 2)])
def test_pyramids_of_any_height_are_trained(ratios: tuple[int, ...]) -> None:
    """One stage is flow matching without a pyramid, the paper's baseline."""
    config = TrainingConfig(ratios)
    scheduler = PyramidFlowScheduler(config.n_stages)
    assert scheduler.stage_range == tuple(s / len(ratios) for s in range(len(ratios) + 1))
    latents, text = random_batch(sum(ratios), 2, torch.float32)
    latents = torch.cat([latents] * 2, dim=-2)  # 16 x 16: four stages fit
    units = [2] * config.n_stages
    draws = draw(latents, config, units, seed=0)
    model = example_model(FluxConfig.from_dict(RAW), FUSED)
    columns = training_columns(latents, draws, config, scheduler, units, FUSED)
    loss = training_step(model, columns, text).loss
    loss.backward()
    assert loss.isfinite() and len(columns) == sum(ratios)
